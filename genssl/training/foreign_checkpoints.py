"""Backbones in checkpoints: of solo-learn, of lightly, and of what else keeps torchvision's names.

Layouts that are known, each with what must be done so that the features are those of the framework:

- solo-learn: `backbone.*` (`encoder.*` in old versions) beside `classifier.*`. Its small-image stem pads by 2.
- lightly: `backbone.*`, as a ResNet, or as a Sequential of the children of one. The children of lightly's own ResNet
  have no ReLU after the stem's batch norm, since that is a function in its `forward`. Split batch norms keep statistics
  of every split; the mean of them is what lightly evaluates with.
- genssl: `method.backbone.*` of a run's checkpoint.pt.
- Official MoCo, SimSiam, Barlow Twins, DINO and others: any prefix before torchvision's or timm's names.

Momentum, teacher, target and key networks are passed over where there is another one.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genssl.backbones.configs import (
    ResNet10Config,
    ResNet18Config,
    ResNet34Config,
    ResNet50Config,
    ViTSmallConfig,
    ViTTinyConfig,
)
from genssl.backbones.vit import CHANNELS_AND_HEADS
from genssl.config.base import ComponentConfig
from genssl.errors import UserError
from genssl.registry import BACKBONES
from genssl.runtime import seeded_initialisation
from genssl.training.saved_state import DamagedError, check_digest

Tensors = dict[str, torch.Tensor]

OWN = "method.backbone."  # in a checkpoint.pt of genssl, whose encoders take images as they are
SECOND = re.compile(r"momentum|teacher|target|(^|[._])ema|(_k|key)\.")
RESNETS: dict[tuple[bool, tuple[int, ...]], Any] = {  # by bottleneck or not, and blocks a stage
    (False, (1, 1, 1, 1)): ResNet10Config,
    (False, (2, 2, 2, 2)): ResNet18Config,
    (False, (3, 4, 6, 3)): ResNet34Config,
    (True, (3, 4, 6, 3)): ResNet50Config,
}
# Where `nn.Sequential(*list(resnet.children())[:-1])` has the parts: of torchvision's ResNet, and of lightly's.
TORCHVISION_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
LIGHTLY_CHILDREN = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}


class EncoderError(UserError):
    """An encoder that is absent, cannot be read, or does not fit its network."""


@dataclass(frozen=True)
class ForeignBackbone:
    """A backbone with the weights of a checkpoint.

    Attributes:
        network: on the CPU.
        config: what it was built from.
        normalize: name of the image statistics that its framework trains with.
        facts: what was concluded from the file, for provenance.
    """

    network: nn.Module
    config: ComponentConfig
    normalize: str = "imagenet"
    facts: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Tensors:
    """Returns all tensors of a file that `torch.save` wrote, named by their key paths; runs no code of the file.

    Raises:
        EncoderError: if it is no such file, or holds Python objects beside tensors and plain data.
    """
    try:
        with warnings.catch_warnings():  # about protocols of pickle, beside the error that follows
            warnings.simplefilter("ignore", UserWarning)
            check_digest(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError as error:
        raise EncoderError(f"{path}: is damaged ({error}); get it again, or take another checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise EncoderError(
                f"{path}: holds a Python object ({named[1].rstrip('.')}), which could run code when it is loaded, so "
                "the file is not opened; ask its author for the state dict alone, or, if you trust it, take that out: "
                "python -c \"import torch; torch.save(torch.load('FILE', weights_only=False)['state_dict'], 'NEW')\""
            ) from None
        raise EncoderError(
            f"{path}: is damaged, or no file that torch.save wrote ({type(error).__name__}); get it again"
        ) from None
    tensors: Tensors = {}
    _collect(content, (), tensors)
    if not tensors:
        raise EncoderError(f"{path}: holds no tensors; give the checkpoint of an encoder")
    return tensors


def _collect(value: Any, path: tuple[str, ...], into: Tensors) -> None:
    if isinstance(value, torch.Tensor):
        into[".".join(path)] = value.detach()
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, (*path, str(key)), into)


def foreign_backbone(path: Path, tensors: Tensors, config: ComponentConfig | None) -> ForeignBackbone:
    """Finds the backbone among the tensors of a file and builds it.

    Args:
        path: for messages.
        tensors: by key path.
        config: the backbone, if it is known; then nothing is concluded from the framework's habits.

    Raises:
        EncoderError: if there is none, it is of another architecture, or there are several to choose from.
    """
    if config is not None:
        network = _build(config)
        prefix = _prefix_for(path, tensors, network, config)
        weights = _below(tensors, prefix)
        _load(path, network, weights, config)
        return ForeignBackbone(network, config, facts={"prefix": prefix})
    candidates = _resnets(tensors) | _vits(tensors)
    prefix, layout = _only_one(path, tensors, candidates)
    weights = _renamed(_below(tensors, prefix), layout)
    inferred = _vit_config(path, weights) if layout == "vit" else _resnet_config(path, weights)
    network = _build(inferred)
    _load(path, network, weights, inferred)
    facts: dict[str, Any] = {"prefix": prefix, "layout": layout}
    normalize = "none" if prefix == OWN else "imagenet"
    if layout == "lightly children":
        network.relu = nn.Identity()
        facts["stem"] = "no ReLU after the first batch norm, as lightly's Sequential of children"
    classifier = tensors.get(re.sub(r"(backbone|encoder)\.$", "classifier.weight", prefix))
    if layout == "resnet" and classifier is not None and getattr(inferred, "stem", "") == "small":
        network.conv1.padding = (2, 2)  # type: ignore[union-attr]
        normalize = {10: "cifar10", 100: "cifar100"}.get(len(classifier), "imagenet")
        facts["stem"] = f"padded by 2 and {normalize} statistics, as in solo-learn"
    return ForeignBackbone(network, inferred, normalize, facts)


def _resnets(tensors: Tensors) -> dict[str, str]:
    """Returns the layout of the ResNets, by prefix."""
    found = {}
    for key in tensors:
        if (match := re.fullmatch(r"(|.*\.)layer1\.0\.conv1\.weight", key)) is not None:
            found[match[1]] = "resnet"
        elif (match := re.fullmatch(r"(|.*\.)[24]\.0\.conv1\.weight", key)) and f"{match[1]}0.weight" in tensors:
            lightly = f"{match[1]}2.0.conv1.weight" in tensors
            found[match[1]] = "lightly children" if lightly else "torchvision children"
    return found


def _vits(tensors: Tensors) -> dict[str, str]:
    end = "patch_embed.proj.weight"
    return {key[: -len(end)]: "vit" for key in tensors if key == end or key.endswith(f".{end}")}


def _only_one(path: Path, tensors: Tensors, candidates: dict[str, str]) -> tuple[str, str]:
    first = {prefix: layout for prefix, layout in candidates.items() if not SECOND.search(prefix)}
    usable = first or candidates
    if not usable:
        raise EncoderError(
            f"{path}: no ResNet and no ViT is among its {len(tensors)} tensors, such as {min(tensors)}; name the "
            "network with --backbone, such as --backbone '{name: timm/convnext_tiny}'"
        )
    if len(usable) > 1:
        raise EncoderError(
            f"{path}: holds {len(usable)} networks, {', '.join(sorted(usable))}; keep one of them in a file of its own"
        )
    return next(iter(usable.items()))


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _renamed(weights: Tensors, layout: str) -> Tensors:
    """Returns the weights under torchvision's or timm's names."""
    children = {"lightly children": LIGHTLY_CHILDREN, "torchvision children": TORCHVISION_CHILDREN}.get(layout)
    renamed = {}
    for key, value in weights.items():
        first, dot, rest = key.partition(".")
        if children is not None:
            first = children.get(first, first)
        renamed[f"{first}{dot}{rest}".replace(".shortcut.", ".downsample.")] = value
    for key in [key for key in renamed if key.endswith(("running_mean", "running_var"))]:
        scale = renamed.get(f"{key.rpartition('.')[0]}.weight")
        if scale is not None and len(renamed[key]) != len(scale) and len(renamed[key]) % len(scale) == 0:
            renamed[key] = renamed[key].view(-1, len(scale)).mean(dim=0)  # lightly's split batch norm
    return renamed


def _resnet_config(path: Path, weights: Tensors) -> ComponentConfig:
    bottleneck = "layer1.0.conv3.weight" in weights
    counts = tuple(
        1 + max((int(key.split(".")[1]) for key in weights if key.startswith(f"layer{stage}.")), default=-1)
        for stage in (1, 2, 3, 4)
    )
    blocks = counts[: 4 - counts.count(0)]  # a stage that is missing in between stays, and fits nothing
    stem = weights.get("conv1.weight")
    fitting = (
        model for (deep, layers), model in RESNETS.items() if deep == bottleneck and layers[: len(blocks)] == blocks
    )
    model = next(fitting, None) if blocks else None
    if model is None or stem is None or stem.ndim != 4 or stem.shape[1] != 3 or stem.shape[2] not in (3, 7):
        what = "bottleneck" if bottleneck else "basic"
        raise EncoderError(
            f"{path}: is a ResNet of {what} blocks {list(blocks)} with a stem of {_shape(stem)}, which is none of "
            "ResNet-10, -18, -34 and -50; name the network with --backbone, such as --backbone '{name: timm/resnet101}'"
        )
    kind = "small" if stem.shape[2] == 3 else "imagenet"
    config: ComponentConfig = model(stem=kind, width=int(stem.shape[0]), stages=len(blocks))
    return config


def _vit_config(path: Path, weights: Tensors) -> ComponentConfig:
    patches, positions = weights["patch_embed.proj.weight"], weights.get("pos_embed")
    depth = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=-1)
    models: dict[int, Any] = {
        CHANNELS_AND_HEADS[name][0]: model
        for name, model in {"vit_tiny": ViTTinyConfig, "vit_small": ViTSmallConfig}.items()
    }
    model = models.get(len(patches))
    grid = math.isqrt(positions.shape[1] - 1) if positions is not None and positions.ndim == 3 else 0
    if model is None or depth == 0 or positions is None or grid**2 + 1 != positions.shape[1]:
        raise EncoderError(
            f"{path}: is a ViT of {len(patches)} channels and {depth} blocks with positions {_shape(positions)}, which "
            "is neither ViT-Tiny nor ViT-Small; name the network with --backbone, such as --backbone "
            "'{name: timm/vit_base_patch16_224}'"
        )
    patch = int(patches.shape[-1])
    config: ComponentConfig = model(image_size=grid * patch, patch_size=patch, depth=depth)
    return config


def _prefix_for(path: Path, tensors: Tensors, network: nn.Module, config: ComponentConfig) -> str:
    """Returns what stands before the names of the network's weights in the file."""
    names = list(network.state_dict())
    prefixes = {key[: -len(names[0])] for key in tensors if key.endswith(names[0])}
    whole = {prefix: "" for prefix in prefixes if all(f"{prefix}{name}" in tensors for name in names)}
    if not whole:
        nearest = max(prefixes, key=lambda prefix: sum(f"{prefix}{name}" in tensors for name in names), default="")
        missing = next(name for name in names if f"{nearest}{name}" not in tensors)
        raise EncoderError(f"{path}: is no {config.name}: {missing} is not among its {len(tensors)} tensors")
    return _only_one(path, tensors, whole)[0]


def _build(config: ComponentConfig) -> nn.Module:
    with seeded_initialisation("encoder"):  # the first weights are overwritten; the global stream stays as it is
        network: nn.Module = BACKBONES.get(config.name)(config)
    return network


def _load(path: Path, network: nn.Module, weights: Tensors, config: ComponentConfig) -> None:
    own = network.state_dict()
    for name, value in own.items():
        if name not in weights:
            raise EncoderError(f"{path}: is no {config.name}: {name} is missing")
        if weights[name].shape != value.shape:
            raise EncoderError(
                f"{path}: is no {config.name} of the backbone's settings: {name} is {_shape(weights[name])} and not "
                f"{_shape(value)}"
            )
    network.load_state_dict({name: weights[name] for name in own})


def _shape(tensor: torch.Tensor | None) -> str:
    return "nothing" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"
