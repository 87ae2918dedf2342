"""Official IC-GAN models (BigGAN backbone): their checkpoints, read by shape with spectral norm folded, and features.

The checkpoints are CC BY-NC 4.0, brought by the user. Of the files in an official archive only `G_ema_best*.pth` is
read: a plain mapping of tensors, which `torch.load(weights_only=True)` takes. `state_dict_best*.pth` pickles a config
with code objects and is refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from genssl.backbones.configs import ResNet50Config
from genssl.backbones.resnet import ResNet, build_resnet
from genssl.base import safetensors_file
from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError
from genssl.generators.finite import check_weights, is_finite
from genssl.generators.icgan.networks import Architecture, GeneratorNetwork
from genssl.generators.preprocessing import crop_then_resize

FILE = "features.safetensors"
Preprocess = Literal["train", "colab", "raw"]
NETWORK_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPECTRAL_EPS = 1e-6
HEADS = ("projection_head.", "prototypes.", "fc.")
Tensors = Mapping[str, torch.Tensor]

# Official module names by ours; a number stands for every block.
_BLOCK = {
    "norm1.norm": "0.bn1",
    "norm1.gain": "0.bn1.gain",
    "norm1.bias": "0.bn1.bias",
    "conv1": "0.conv1",
    "norm2.norm": "0.bn2",
    "norm2.gain": "0.bn2.gain",
    "norm2.bias": "0.bn2.bias",
    "conv2": "0.conv2",
    "shortcut": "0.conv_sc",
}
_ATTENTION = {"query": "1.theta", "key": "1.phi", "value": "1.g", "out": "1.o"}
_STATISTICS = {"running_mean": "stored_mean", "running_var": "stored_var"}
_NORMS = ("norm", "norm1.norm", "norm2.norm")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a .pth or .safetensors file on the CPU, without the prefix that DataParallel gives.

    Raises GeneratorError if it is missing, broken, holds other objects than tensors, or is no flat mapping.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors_file.read_tensors(path)[0]
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise GeneratorError(
            f"{path}: is broken, or holds Python objects besides tensors, and unpickling those can run code; give the "
            "file G_ema_best0.pth or G_ema_best1.pth of the archive (state_dict_*.pth is not needed)"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise GeneratorError(f"{path}: cannot be read as a PyTorch checkpoint ({reason})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise GeneratorError(f"{path}: is not a mapping of names to tensors, as G_ema_best*.pth is")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def infer_architecture(state: Tensors) -> Architecture:
    """Returns the architecture that the shapes of an official generator's tensors tell, or raises GeneratorError."""
    try:
        first, feature = state["linear.weight"].shape, state["shared_feat.weight"].shape
        numbers = sorted({int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.0\.conv1\.weight$", name))})
        convolutions = [state[f"blocks.{number}.0.conv1.weight"].shape for number in numbers]
        condition = state["blocks.0.0.bn1.gain.weight"].shape[1]
        shared = state.get("shared.weight")
    except KeyError as error:
        raise GeneratorError(
            f"the checkpoint has no tensor {error}: it is not an instance-conditioned BigGAN generator "
            "(a discriminator, StyleGAN2 or class-only BigGAN checkpoint cannot be used)"
        ) from None
    channels = (int(convolutions[0][1]), *(int(shape[0]) for shape in convolutions))
    chunk, classes_width = int(first[1]), int(condition - first[1] - feature[0])
    bottom = round((first[0] / channels[0]) ** 0.5)
    if numbers != list(range(len(numbers))) or bottom * bottom * channels[0] != first[0]:
        raise GeneratorError("the checkpoint's blocks are incomplete or do not fit its first layer")
    if classes_width and (shared is None or shared.shape[1] != classes_width):
        raise GeneratorError(
            f"the checkpoint's condition has {condition} columns: noise {chunk} and feature {feature[0]} leave "
            f"{classes_width} for the class, and its class embedding does not have that width"
        )
    return Architecture(
        feature_dim=int(feature[1]),
        feature_width=int(feature[0]),
        noise_chunk=chunk,
        bottom=bottom,
        channels=channels,
        attention=tuple(number for number in numbers if f"blocks.{number}.1.gamma" in state),
        classes=int(shared.shape[0]) if classes_width and shared is not None else 0,
        class_width=classes_width,
    )


def convert_generator(state: Tensors) -> tuple[Architecture, dict[str, torch.Tensor]]:
    """Turns an official generator's tensors into `GeneratorNetwork`'s (float32); GeneratorError says what is amiss."""
    architecture = infer_architecture(state)
    modules = {"embed_feature": "shared_feat", "first": "linear", "norm": "output_layer.0", "to_rgb": "output_layer.2"}
    for number in range(architecture.blocks):
        modules |= {f"blocks.{number}.{ours}": f"blocks.{number}.{theirs}" for ours, theirs in _BLOCK.items()}
    for number in architecture.attention:
        modules |= {f"attentions.{number}.{ours}": f"blocks.{number}.{theirs}" for ours, theirs in _ATTENTION.items()}
        modules[f"attentions.{number}"] = f"blocks.{number}.1"
    if architecture.classes:
        modules["embed_class"] = "shared"
    with torch.device("meta"):
        expected = GeneratorNetwork(architecture).state_dict()

    used = {"shared.weight"}  # official files have a class embedding even where no layer reads it
    converted, problems = {}, []
    for name, meta in expected.items():
        ours, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked":
            converted[name] = torch.zeros((), dtype=torch.int64)
            continue
        is_norm = ours == "norm" or ours.endswith(_NORMS[1:])
        # The last norm's scale is a "gain" there and a "weight" in torch; conditional norms have a module of that name.
        official_leaf = _STATISTICS.get(leaf, "gain" if is_norm and leaf == "weight" else leaf)
        theirs = f"{modules[ours]}.{official_leaf}"
        tensor = state.get(theirs)
        if tensor is None or tensor.shape != meta.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            problems.append(f"{theirs} {found}; {tuple(meta.shape)} is expected")
            continue
        vector = state.get(f"{modules[ours]}.u0")
        used |= {theirs, f"{modules[ours]}.u0", f"{modules[ours]}.sv0"}
        if leaf == "weight" and vector is not None:
            if vector.shape != (1, len(tensor)):
                problems.append(f"{modules[ours]}.u0 has shape {tuple(vector.shape)}; (1, {len(tensor)}) is expected")
                continue
            tensor = fold_spectral_norm(tensor.float(), vector.float())
        elif leaf == "weight" and not is_norm and ours != "embed_class":
            problems.append(f"{modules[ours]}.u0 is missing; without it the spectral norm cannot be reproduced")
        converted[name] = tensor.float().contiguous()
        if not is_finite(converted[name]):
            problems.append(f"{theirs} holds NaN or infinite numbers, or has a spectral norm of 0; it is damaged")
    problems += [f"{name} is not part of this architecture" for name in sorted(set(state) - used)]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise GeneratorError(f"the checkpoint does not fit: {'; '.join(problems[:5])}{more}")
    return architecture, converted


def fold_spectral_norm(weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Divides a weight [out, ...] by its spectral norm as BigGAN estimates it, by one power iteration of the vector.

    An exact singular value would give other images, since the averaged generator's vectors [1, out], not of unit
    length, are averages too.
    """
    matrix = weight.flatten(1)
    right = F.normalize(vector @ matrix, eps=SPECTRAL_EPS)
    left = F.normalize(right @ matrix.T, eps=SPECTRAL_EPS)
    return weight / (right @ matrix.T @ left.T).squeeze()


def convert_features(state: Tensors) -> dict[str, torch.Tensor]:
    """Returns the trunk of a ResNet-50 (SwAV's, or torchvision's for class-conditional models) in float32.

    Projection head, prototypes and classifier are left out. Raises GeneratorError for another or a damaged network.
    """
    trunk = {name: tensor for name, tensor in state.items() if not name.startswith(HEADS)}
    with torch.device("meta"):
        expected = build_resnet(ResNet50Config()).state_dict()
    wrong = [name for name in expected if name not in trunk or trunk[name].shape != expected[name].shape]
    wrong += [name for name in trunk if name not in expected]
    if wrong:
        raise GeneratorError(f"the feature extractor is not a ResNet-50: {wrong[0]} is missing, surplus or misshapen")
    check_weights("the feature extractor", trunk)
    return {
        name: (tensor if tensor.dtype == torch.int64 else tensor.float()).contiguous() for name, tensor in trunk.items()
    }


def load_resnet(folder: Path) -> ResNet:
    """Loads features.safetensors from a generator's folder; maps normalised images to features [B, 2048]."""
    try:
        weights = convert_features(read_tensors(folder / FILE))
    except GeneratorError as error:
        raise GeneratorError(f"{folder}: {error}; make the folder again with `genssl convert-weights`") from None
    with torch.device("meta"):  # no first weights are drawn
        network = build_resnet(ResNet50Config(stem="imagenet"))
    network.load_state_dict(weights, assign=True)
    return network


class ResNetFeatures:
    """Images to unit-length features; float32, frozen, in evaluation mode.

    The centre square, cut out to a whole pixel, is brought to the generator's resolution (bilinear), as by the official
    CenterCropLongEdge and torchvision's Resize. Then:
    "train", what the models were trained with, resizes it to 224 px (bicubic, not antialiased, align_corners false);
    "colab" does so with align_corners true, as the official notebook; "raw" takes it as it is, as GenerativeSSL's
    script took its 256 px files.
    """

    def __init__(self, folder: Path, image_size: int, preprocess: Preprocess, device: torch.device) -> None:
        network = load_resnet(folder)
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = device
        self._preprocess = preprocess
        self.embedding_dim = network.feature_dim
        self.image_size = image_size

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Cuts the centre square of uint8 [3, H, W] out and resizes it to uint8 [3, image_size, image_size]."""
        return crop_then_resize(image, self.image_size)

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, image_size, image_size]; returns float32 [B, 2048] of unit length on the CPU."""
        mean, std = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (MEAN, STD))
        pixels = (images.to(self._device).float() / 255 - mean) / std
        if self._preprocess != "raw":
            pixels = F.interpolate(
                pixels, (NETWORK_SIZE, NETWORK_SIZE), mode="bicubic", align_corners=self._preprocess == "colab"
            )
        features: torch.Tensor = self._network(pixels)
        return F.normalize(features, dim=1).cpu()
