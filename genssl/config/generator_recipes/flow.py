"""The recipe of a rectified flow on one's own images, conditioned on self-supervised features; no labels.

It trains a flow, or distils one into a student of fewer steps, or does both, one after the other.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from genssl.config.base import Section
from genssl.config.generator_recipes.base import Count, GeneratorRecipe
from genssl.config.generator_recipes.sections import AutoencoderConfig, ConditionerConfig


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


class DistillationConfig(Section):
    """A student that goes in `steps` Euler steps where its teacher goes in `teacher_steps`."""

    steps: int = Field(1, ge=1, le=16, description="Euler steps of the student; it knows no other number")
    teacher: str | None = Field(
        None,
        min_length=1,
        description="builtin:NAME or the folder of a flow; by default the flow that this recipe trains first",
    )
    teacher_steps: int = Field(8, ge=1, le=1000, description="a multiple of `steps`")
    objective: Literal["trajectory", "consistency"] = Field(
        "trajectory",
        description="trajectory: regresses on where the teacher's steps lead from noise; consistency: one step of the "
        "teacher from a noised image, then the student's own average",
    )
    guidance_scale: float = Field(
        1.0, ge=0, le=100, description="of the teacher; the student has it built in, at the cost of none"
    )
    training_steps: Count = 4000
    batch_size: int = Field(128, ge=2)
    lr: float = Field(1e-3, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)

    @field_validator("teacher_steps")
    @classmethod
    def _whole_parts(cls, value: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps", 1)
        if value % steps or value == steps:
            raise ValueError(f"the teacher's {value} steps are not a multiple, 2 or more, of the student's {steps}")
        return value


class FlowRecipe(GeneratorRecipe):
    """A flow: its conditioner, its autoencoder if it is one of latents, the UNet, and its student if asked for."""

    family: Literal["flow"] = "flow"
    distill: DistillationConfig | None = None
    conditioner: ConditionerConfig | None = Field(
        None,
        validate_default=True,
        description="whose features the flow is given; with a distill.teacher, the teacher's",
    )
    autoencoder: AutoencoderConfig | None = Field(
        None, description="the flow is one of its latents; without, of pixels; with a distill.teacher, the teacher's"
    )
    flow: FlowTrainingConfig = FlowTrainingConfig()

    @field_validator("conditioner", "autoencoder")
    @classmethod
    def _one_of_each(cls, value: Section | None, info: ValidationInfo) -> Section | None:
        distill = info.data.get("distill")
        if distill is not None and distill.teacher is not None:
            if value is not None:
                raise ValueError("the distill.teacher brings its own; leave this out")
        elif value is None and info.field_name == "conditioner" and "distill" in info.data:
            raise ValueError("the flow needs one; only with a distill.teacher is there one already")
        return value
