"""Settings of the backbones. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from genssl.config.base import ComponentConfig


class ResNetConfig(ComponentConfig):
    """What the ResNets have in common."""

    stem: Literal["imagenet", "small"] = Field(
        "imagenet",
        description=(
            "small: 3x3 convolution, stride 1, no pooling, for images of about 64 pixels and less "
            "(SimCLR, appendix B.9)"
        ),
    )
    width: int = Field(64, ge=4, le=512, description="channels of the first stage; 64 is the standard network")
    stages: int = Field(
        4,
        ge=1,
        le=4,
        description=(
            "of the standard network's four, of which each but the first halves the image; fewer for images so small "
            "that the last would see a single pixel, as ResNets for CIFAR have three (He et al., section 4.2)"
        ),
    )


class ResNet10Config(ResNetConfig):
    """ResNet-10, one block a stage: half of ResNet-18, for small images and quick trials. torchvision has none."""

    name: Literal["resnet10"] = "resnet10"


class ResNet18Config(ResNetConfig):
    """ResNet-18."""

    name: Literal["resnet18"] = "resnet18"


class ResNet34Config(ResNetConfig):
    """ResNet-34."""

    name: Literal["resnet34"] = "resnet34"


class ResNet50Config(ResNetConfig):
    """ResNet-50."""

    name: Literal["resnet50"] = "resnet50"


class ViTConfig(ComponentConfig):
    """What the vision transformers have in common."""

    image_size: int = Field(224, ge=1, description="pixels of the square views; the views of a run must have this size")
    patch_size: int = Field(16, ge=1, description="pixels of a square patch; must divide image_size")
    depth: int = Field(12, ge=1, description="blocks; 12 is the standard network")
    interpolate_positions: bool = Field(
        False, description="views of other sizes, such as those of multi-crop, get interpolated position embeddings"
    )
    heads: int | None = Field(
        None, ge=1, description="of attention; by default one for 64 channels, and MoCo v3's ViT-Small has 12"
    )
    layer_scale: float | None = Field(
        None,
        gt=0,
        description="first value of LayerScale (CaiT, arXiv 2103.17239), as DINOv2 has it; by default there is none",
    )
    registers: int = Field(0, ge=0, le=64, description="register tokens (arXiv 2309.16588)")

    channels: ClassVar[int]

    @field_validator("patch_size")
    @classmethod
    def _divides_the_image(cls, value: int, info: ValidationInfo) -> int:
        size = info.data.get("image_size")
        if size is not None and size % value:
            raise ValueError(f"image_size is {size}, which patches of {value} pixels do not divide")
        return value

    @field_validator("heads")
    @classmethod
    def _divides_the_channels(cls, value: int | None) -> int | None:
        if value is not None and cls.channels % value:
            raise ValueError(f"there are {cls.channels} channels, which {value} heads do not divide")
        return value


class ViTTinyConfig(ViTConfig):
    """ViT-Tiny: 192 channels, 3 heads."""

    name: Literal["vit_tiny"] = "vit_tiny"
    channels = 192


class ViTSmallConfig(ViTConfig):
    """ViT-Small: 384 channels, 6 heads."""

    name: Literal["vit_small"] = "vit_small"
    channels = 384


class ViTBaseConfig(ViTConfig):
    """ViT-Base: 768 channels, 12 heads."""

    name: Literal["vit_base"] = "vit_base"
    channels = 768


class ViTLargeConfig(ViTConfig):
    """ViT-Large: 1024 channels, 16 heads."""

    name: Literal["vit_large"] = "vit_large"
    depth: int = Field(24, ge=1, description="blocks; 24 is the standard network")
    channels = 1024


class TimmConfig(ComponentConfig):
    """Any model of timm, `timm/<model>`; random weights, or those of a local file. Nothing is downloaded."""

    name: str = Field("timm/<model>", pattern=r"^timm/[\w.]+$", description="timm/ and the name of one of its models")
    image_size: int | None = Field(None, ge=1, description="timm's img_size, for models that fix it, such as ViTs")
    weights: Path | None = Field(None, description="a safetensors file with the model's state dict")
