"""Settings of the backbones. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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


class ResNet18Config(ResNetConfig):
    """ResNet-18."""

    name: Literal["resnet18"] = "resnet18"


class ResNet50Config(ResNetConfig):
    """ResNet-50."""

    name: Literal["resnet50"] = "resnet50"
