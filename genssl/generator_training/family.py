"""What a family of trainable generators is: a class under its name in `genssl.registry.TRAINABLE`."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from genssl.base.ranks import Ranks
from genssl.config.base import Section
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.generator_training.loop import Loop
from genssl.generator_training.rows import Images
from genssl.generators.conditioner import FILE
from genssl.generators.configs import GeneratorConfig

NORM_GROUPS = 8  # of every network that is trained here

R = TypeVar("R", bound=GeneratorRecipe)


class GeneratorTraining(ABC, Generic[R]):
    """One training of a generator: `prepare`, then `train`, then `write`.

    A package of one's own brings a family by

        @TRAINABLE.register("my_family", config=MyRecipe)
        class MyTraining(GeneratorTraining[MyRecipe]): ...

    and an entry point of the group `genssl.trainable_generators`; `MyRecipe` is a `GeneratorRecipe` with a literal
    `family` and sections of its own.

    Args:
        recipe: of the family's class.
        dataset: the train split; only its images are used.
        loop: device, precision, ranks, checkpoints.
        folder: of the generator that is being made; it exists.

    Attributes:
        about: one paragraph for the README of the trained model.
    """

    about: ClassVar[str]

    def __init__(self, recipe: R, dataset: ImageDataset, loop: Loop, folder: Path) -> None:
        self.recipe, self.dataset, self.loop, self.folder = recipe, dataset, loop, folder

    @abstractmethod
    def prepare(self) -> list[str]:
        """Reads the networks that the recipe brings, and returns what does not fit, as lines "key: problem".

        Raises:
            UserError: if one of them cannot be read.
        """

    @abstractmethod
    def train(self, images: Images) -> nn.Module:
        """Trains all stages on the images of the train split; returns the averaged weights of the last one.

        Raises:
            UserError: if the encoder of a run cannot be read, or a loss is not finite.
            Stopped: after the state was saved, if the user wants to go on later.
        """

    @abstractmethod
    def write(self, place: Path, network: nn.Module) -> GeneratorConfig:
        """Writes all of a generator but its `encoder.safetensors` into a folder; returns the config that loads it."""

    def publish(self, place: Path, network: nn.Module) -> GeneratorConfig:
        """Writes a generator with its `encoder.safetensors`, which stands in the training's folder already."""
        if place != self.folder and (self.folder / FILE).is_file():
            shutil.copyfile(self.folder / FILE, place / FILE)
        return self.write(place, network)

    def run(self) -> GeneratorConfig | None:
        """Trains the generator and writes it into its folder; returns the config that loads it, on the first rank.

        Raises:
            ConfigError: if sizes do not fit each other or the data set; before anything is trained.
            UserError, Stopped: see `prepare` and `train`.
        """
        if problems := self.prepare():
            raise ConfigError(problems)
        network = self.train(Images(self.dataset, self.loop.device))
        return self.publish(self.folder, network) if self.loop.ranks.first else None

    @classmethod
    def teacher(cls, recipe: R, partial: Path) -> GeneratorConfig | None:
        """Returns what the generator was distilled from, which it is measured beside; None if it was not distilled.

        Args:
            recipe: of the training.
            partial: folder of the unfinished training.
        """
        return None

    def batch_problems(self, **sizes: int) -> list[str]:
        """Returns what is wrong with batch sizes, given as SECTION=size, as lines "key: problem"."""
        return batch_problems(self.recipe, len(self.dataset), self.loop.ranks, **sizes)


def fit_batches(recipe: R, images: int, ranks: Ranks) -> tuple[R, list[str]]:
    """Returns the recipe with no batch larger than the data set, and a line on each that was: few images train too.

    A batch that even so does not divide among micro-batches and ranks is left to `batch_problems`.
    """
    parts = recipe.accumulate * ranks.size
    most = images // parts * parts
    changed: dict[str, Section] = {}
    notes = []
    for name in type(recipe).model_fields:
        section: Any = getattr(recipe, name)
        size = getattr(section, "batch_size", None)
        if size is None or size <= images or most < 2 * parts:
            continue
        changed[name] = section.model_copy(update={"batch_size": most})
        given = getattr(section, "run", None) or getattr(section, "model", None)  # then there is nothing to train
        if not given and not (name == "image_encoder" and getattr(recipe, "conditioner", None) is not None):
            notes.append(f"{name}.batch_size: {size} is more than the {images} training images; {most} is taken")
    return recipe.model_copy(update=changed), notes


def batch_problems(recipe: GeneratorRecipe, images: int, ranks: Ranks, **sizes: int) -> list[str]:
    """Returns what is wrong with batch sizes, given as SECTION=size, as lines "key: problem"."""
    problems, parts = [], recipe.accumulate * ranks.size
    among = [f"{recipe.accumulate} micro-batches (accumulate)"] if recipe.accumulate > 1 else []
    among += [f"{ranks.size} ranks"] if ranks.size > 1 else []
    for section, size in sizes.items():
        if size > images:
            problems.append(f"{section}.batch_size: {size} is more than the {images} training images")
        elif size % parts or size // parts < 2:
            problems.append(
                f"{section}.batch_size: {size} does not divide among {' and '.join(among) or 'one rank'} into equal "
                f"parts of at least 2; set it to a multiple of {parts}"
            )
    return problems


def channel_problems(section: str, channels: list[int]) -> list[str]:
    """Returns what is wrong with the widths of a UNet that is told time and embedding, as lines "key: problem"."""
    if any(count % NORM_GROUPS or count < 2 * NORM_GROUPS for count in channels):
        return [
            f"{section}.block_out_channels: {channels} are not all multiples of {NORM_GROUPS} and at least "
            f"{2 * NORM_GROUPS}; a channel that is normalised alone loses what the network is told"
        ]
    return []
