"""The recipe of `genssl train-generator`: what every family of generators has in common, and the choice of a family."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from genssl.config.base import Choice, ComponentConfig, Kind, Section
from genssl.config.document import Document
from genssl.errors import ConfigError, suggest

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Family:
    """One kind of generator that can be trained.

    Attributes:
        recipe: "module:attribute" of its recipe, a `GeneratorRecipe` with a literal `family` and sections of its own.
        trainer: "module:attribute" of `train_and_save(recipe, train, loop, folder) -> GeneratorConfig`, which writes
            the model's files into the existing `folder`, on the first rank, and returns the config that loads them.
        about: one paragraph for the README of the trained model.
    """

    recipe: str
    trainer: str
    about: str

    def load_recipe(self) -> type[GeneratorRecipe]:
        """Returns the recipe's class."""
        model: type[GeneratorRecipe] = _load(self.recipe)
        return model

    def load_trainer(self) -> Any:
        """Returns `train_and_save`; imports torch."""
        return _load(self.trainer)


FAMILIES = {
    "stable_unclip": Family(
        "genssl.config.generator_recipes.unclip:StableUnCLIPRecipe",
        "genssl.generator_training.unclip_pipeline:train_and_save",
        "A miniature Stable unCLIP. It is an ordinary diffusers folder (`StableUnCLIPImg2ImgPipeline`); image encoder, "
        "autoencoder and denoiser are trained, the text path is a random constant that the denoiser does not read.",
    ),
    "flow": Family(
        "genssl.config.generator_recipes.flow:FlowRecipe",
        "genssl.generator_training.flow:train_and_save",
        "A rectified flow, conditioned on the features of a self-supervised encoder: `unet.safetensors` is the "
        "averaged network, `encoder.safetensors` the frozen encoder, `config.json` what rebuilds the network.",
    ),
    "icgan": Family(
        "genssl.config.generator_recipes.icgan:ICGANRecipe",
        "genssl.generator_training.icgan:train_and_save",
        "An instance-conditioned GAN: a generator of one forward pass, conditioned on the features of a "
        "self-supervised encoder.",
    ),
}


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
        if not isinstance(name, str) or name not in FAMILIES:
            place = document.where(("family",))
            raise ConfigError([f"{place}: family: {name!r} is not allowed{suggest(str(name), FAMILIES)}"])
        return FAMILIES[name].load_recipe()


def _load(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
