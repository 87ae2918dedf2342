"""The recipe of a small Stable unCLIP on one's own images, without labels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from genssl.config.base import Section
from genssl.config.generator_recipes.base import Count, GeneratorRecipe
from genssl.config.generator_recipes.sections import AutoencoderConfig, ConditionerConfig
from genssl.config.views import AugmentationConfig


class ImageEncoderConfig(Section):
    """A CLIP vision transformer, trained by SimCLR on the images (no text, no labels)."""

    hidden_size: Count = 96
    num_layers: Count = 4
    num_heads: Count = 4
    patch_size: Count = 2
    embedding_dim: Count = 64
    epochs: Count = 100
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    temperature: float = Field(0.2, gt=0)
    augmentation: AugmentationConfig = AugmentationConfig()


class DenoiserConfig(Section):
    """The UNet, trained by v-prediction (Salimans & Ho 2022) with random noise levels on the embedding."""

    block_out_channels: list[Count] = Field([64, 128], min_length=1)
    layers_per_block: Count = 1
    steps: Count = 4000
    batch_size: int = Field(128, ge=2)
    lr: float = Field(2e-3, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    embedding_dropout: float = Field(
        0.1, ge=0, lt=1, description="part of the rows trained without embedding, for guidance"
    )
    max_noise_level: int = Field(700, ge=0, le=999, description="noise levels 0..this are trained")


class StableUnCLIPRecipe(GeneratorRecipe):
    """A Stable unCLIP: image encoder, autoencoder and denoiser, trained one after the other."""

    family: Literal["stable_unclip"] = "stable_unclip"
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    conditioner: ConditionerConfig | None = Field(
        None, description="the encoder of a run, or a backbone, in the place of `image_encoder`"
    )
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    denoiser: DenoiserConfig = DenoiserConfig()

    @field_validator("conditioner")
    @classmethod
    def _one_encoder(cls, value: ConditionerConfig | None, info: ValidationInfo) -> ConditionerConfig | None:
        if value is not None and info.data.get("image_encoder", ImageEncoderConfig()) != ImageEncoderConfig():
            raise ValueError("it takes the place of `image_encoder`; give one of them")
        return value
