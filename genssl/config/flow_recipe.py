"""The recipe of a rectified flow on one's own images, conditioned on self-supervised features; no labels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genssl.config.base import Section
from genssl.config.conditioner_recipe import ConditionerConfig
from genssl.config.generator_recipe import Count, GeneratorRecipe


class FlowTrainingConfig(Section):
    """The UNet, trained by rectified flow (Liu et al. 2022, arXiv 2209.03003) with noise on some embeddings."""

    target: Literal["self", "neighbours"] = Field(
        "self",
        description="what an image's embedding is to become: the image itself, or one of its neighbours in feature "
        "space (more diverse, less like the source)",
    )
    neighbours: int = Field(10, ge=1, description="target: neighbours: how many of the nearest, the image included")
    block_out_channels: list[Count] = Field([32, 64], min_length=1)
    layers_per_block: Count = 1
    steps: Count = 4000
    batch_size: int = Field(128, ge=2)
    lr: float = Field(2e-3, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    embedding_dropout: float = Field(
        0.1, ge=0, lt=1, description="part of the rows trained without embedding, for guidance"
    )
    max_embedding_noise: float = Field(1.0, ge=0, le=10, description="noise on the embedding, 0..this, is trained")


class FlowRecipe(GeneratorRecipe):
    """A flow: first its conditioner, then the UNet on the conditioner's features."""

    family: Literal["flow"] = "flow"
    conditioner: ConditionerConfig
    flow: FlowTrainingConfig = FlowTrainingConfig()
