"""The recipe of `genssl train-generator`: what every family of generators has in common, and the choice of a family."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from genssl.config.base import Choice, ComponentConfig, Kind, Section
from genssl.config.documents.document import Document
from genssl.errors import ConfigError, suggest
from genssl.registry import TRAINABLE, UnknownNameError

Count = Annotated[int, Field(ge=1)]


class WatchConfig(Section):
    """What is looked at while the last stage is trained: a grid of variants and a Frechet distance.

    Sources are held out from the training if `validation_fraction` says so; the test split is never used.
    """

    every_steps: int = Field(500, ge=1)
    sources: int = Field(
        256, ge=16, description="images, at most: variants of one half are compared with the other half"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="the training ends when so many looks brought no smaller distance, and the best weights are kept",
    )


class GeneratorRecipe(Choice):
    """What `genssl train-generator` needs to know whatever the family; `validate` reads a document by its family."""

    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = Field(0, ge=0, lt=2**31)
    family: str = "stable_unclip"
    licence: str = Field("Apache-2.0", description="of the trained weights; written into the card and shown by servers")
    dataset: Annotated[SerializeAsAny[ComponentConfig], Kind("datasets")]
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="above 0: this part of the train split is held out, and quality is measured on it, not on test",
    )
    quality: Literal["none", "quick", "full"] = Field(
        "quick",
        description="what is measured once the weights are written: nothing; a few hundred sources at most; or "
        "thousands. Fewer where variants are large or take many steps",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Literal["auto"] | Count = "auto"
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the forward pass in training (autocast); weights stay fp32"
    )
    channels_last: bool = Field(False, description="memory order of convolutions; faster with tensor cores")
    accumulate: Count = Field(
        1,
        description="micro-batches a step; a contrastive loss has only the micro-batch's negatives, and batch norm its "
        "statistics",
    )
    monitor: WatchConfig | None = None

    @field_validator("monitor")
    @classmethod
    def _patience_needs_images_of_its_own(cls, value: WatchConfig | None, info: ValidationInfo) -> WatchConfig | None:
        if value is not None and value.patience is not None and info.data.get("validation_fraction") == 0:
            raise ValueError(
                "patience chooses weights, which neither training nor test images may do; set validation_fraction "
                "above 0, or leave patience out"
            )
        return value

    @classmethod
    def member_for(cls, document: Document) -> type[GeneratorRecipe]:
        """Returns the recipe class that the document's `family` names.

        Raises:
            ConfigError: at file:line, if there is no such family.
        """
        if cls is not GeneratorRecipe:
            return cls
        name = document.data.get("family", cls.model_fields["family"].default)
        try:
            model: type[GeneratorRecipe] = TRAINABLE.config(str(name))
        except UnknownNameError:
            where, known = document.where(("family",)), TRAINABLE.names()
            raise ConfigError([f"{where}: family: {name!r} is not allowed{suggest(str(name), known)}"]) from None
        return model
