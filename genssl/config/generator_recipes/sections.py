"""Sections that the recipes of several families of generators have: their conditioner, their autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from genssl.config.base import ComponentConfig, Kind, Section
from genssl.config.generator_recipes.base import Count
from genssl.config.views import AugmentationConfig


class ConditionerConfig(Section):
    """Either the encoder of a finished run, or a backbone that is trained by SimCLR on the images first (no labels)."""

    run: Path | None = Field(
        None, description="a run directory whose encoder.safetensors is copied; nothing is trained then"
    )
    backbone: Annotated[SerializeAsAny[ComponentConfig] | None, Kind("backbones")] = Field(
        None, validate_default=True, description="trained by SimCLR with the settings below; not together with `run`"
    )
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    temperature: float = Field(0.2, gt=0)
    projector_hidden_dim: int = Field(256, ge=1)
    projector_output_dim: int = Field(64, ge=1)
    augmentation: AugmentationConfig = AugmentationConfig()

    @field_validator("backbone")
    @classmethod
    def _one_of_both(cls, value: ComponentConfig | None, info: ValidationInfo) -> ComponentConfig | None:
        if "run" in info.data and (value is None) == (info.data["run"] is None):
            raise ValueError("the encoder comes from a `run` or is a `backbone` trained here; give one of them")
        return value


class AutoencoderConfig(Section):
    """A KL autoencoder (Rombach et al. 2022), given or trained here on the images.

    Each channel count beyond the first halves the resolution.
    """

    model: str | None = Field(
        None,
        min_length=1,
        description="folder or hub id of a diffusers AutoencoderKL, which is copied; nothing below is used then",
    )
    block_out_channels: list[Count] = Field([32, 64], min_length=1)
    latent_channels: Count = 4
    epochs: Count = 100
    batch_size: int = Field(128, ge=2)
    lr: float = Field(2e-3, gt=0)
    kl_weight: float = Field(1e-4, ge=0)
