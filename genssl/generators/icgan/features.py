"""The feature extractor of official IC-GAN models: a ResNet-50, SwAV's or torchvision's, that the user supplies."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from genssl.backbones.configs import ResNet50Config
from genssl.backbones.resnet import ResNet, build_resnet
from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError
from genssl.generators.icgan.official import convert_features, read_tensors
from genssl.generators.preprocessing import crop_then_resize

FILE = "features.safetensors"
Preprocess = Literal["train", "colab", "raw"]
NETWORK_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_resnet(folder: Path) -> ResNet:
    """Loads features.safetensors from a generator's folder; maps normalised images to features [B, 2048].

    Raises:
        GeneratorError: if the weights are missing, broken or of another network.
    """
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

    Attributes:
        embedding_dim: 2048.
        image_size: side of the images that `embed` takes, the generator's resolution.

    Args:
        folder: of the generator; holds features.safetensors.
        image_size: the generator's resolution in pixels.
        preprocess: one of the three rules.
        device: where it runs.

    Raises:
        GeneratorError: if the weights are missing, broken or of another network.
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
