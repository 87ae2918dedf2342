"""The recipe of `genssl train-generator` for the family `icgan`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from genssl.config.base import Section
from genssl.config.generator_recipes.base import Count, GeneratorRecipe
from genssl.config.generator_recipes.sections import ConditionerConfig


class ICGANGeneratorConfig(Section):
    """Shape of the generator: each channel count beyond the first is a block that doubles the side."""

    bottom: int = Field(4, ge=1, le=64, description="side of the first feature map in pixels")
    channels: list[Count] = Field([64, 64], min_length=2)
    attention: list[Annotated[int, Field(ge=0)]] = Field([], description="blocks, from 0, that self-attention follows")
    feature_width: Count = 64
    noise_chunk: Count = 16


class ICGANDiscriminatorConfig(Section):
    """Shape of the projection discriminator: each channel count is a block that halves the side."""

    channels: list[Count] = Field([64, 64], min_length=1)


class AdversarialConfig(Section):
    """How the two are trained: hinge loss, Adam with betas (0, 0.999)."""

    neighbours: int = Field(10, ge=1, description="real images of an instance are this many nearest ones in features")
    steps: Count = 4000
    batch_size: int = Field(64, ge=2)
    lr_generator: float = Field(1e-3, gt=0)
    lr_discriminator: float = Field(1e-3, gt=0)
    discriminator_steps: int = Field(1, ge=1, le=16, description="steps of the discriminator for one of the generator")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    translation: float = Field(0.125, ge=0, le=0.5, description="DiffAugment: largest shift as a part of the side")
    cutout: float = Field(0.0, ge=0, lt=1, description="DiffAugment: side of the blank square as a part of the side")


class ICGANRecipe(GeneratorRecipe):
    """An instance-conditioned GAN (Casanova et al. 2021, arXiv 2109.05070), its conditioner first."""

    family: Literal["icgan"] = "icgan"
    conditioner: ConditionerConfig
    generator: ICGANGeneratorConfig = ICGANGeneratorConfig()
    discriminator: ICGANDiscriminatorConfig = ICGANDiscriminatorConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
