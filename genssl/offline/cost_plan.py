"""What variants cost online, offline, and under a budget: arithmetic alone. Imports no torch and no numpy.

With N images, E epochs, v variants an image and step on average, and rates R (variants/s of one generator) and
T (images/s of the trainer, waiting left out):

    slots            S = N E v                     views that want a variant
    training         N E / T / 3600                hours
    generating       distinct / R / 3600           generator-hours, whatever the mode
    reuse factor     S / distinct                  how often a variant is seen
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssl.config.recipe import Recipe
from genssl.errors import UserError

HOUR = 3600.0
PNG_OF_RAW = 0.6
# JPEG at quality 90 of photographs: 25 KB at 224 pixels, 35 KB at 256 and 70 KB at 512, as bytes a pixel.
JPEG_BYTES_PER_PIXEL = ((224, 25_000 / 224**2), (256, 35_000 / 256**2), (512, 70_000 / 512**2))
ASSUMPTIONS = (
    f"PNG is taken as {PNG_OF_RAW:g} of raw (photographs; not measured here), JPEG at quality 90 as 25 KB at 224 "
    "pixels, 35 KB at 256, 70 KB at 512, and by area beyond; a store adds up to 4 KB a variant"
)


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    Attributes:
        images: N, of the train split.
        epochs: E.
        views: v, variants that a step wants of each of its images, on average.
        generator_rate: R, variants a second of one generator.
        trainer_rate: T, images (pairs of views) a second of the trainer.
        variants: K, stored of each image.
        generators: how many work side by side.
        budget: generator-hours for the refreshed pool; None: as long as the training takes.
        size: side of a variant in pixels.
    """

    images: int
    epochs: int
    views: float
    generator_rate: float
    trainer_rate: float
    variants: int
    generators: int = 1
    budget: float | None = None
    size: int = 0

    @property
    def slots(self) -> float:
        """S, views of the run that want a variant."""
        return self.images * self.epochs * self.views

    @property
    def trainer_hours(self) -> float:
        """Of training alone."""
        return self.images * self.epochs / self.trainer_rate / HOUR

    @property
    def generators_to_keep_up(self) -> int:
        """How many generators make a fresh variant for every slot without holding up the trainer."""
        return math.ceil(round(self.trainer_rate * self.views / self.generator_rate, 9))

    def generator_hours(self, variants: float) -> float:
        """Returns the device-hours that so many variants take, over all generators."""
        return variants / self.generator_rate / HOUR


@dataclass(frozen=True)
class Cost:
    """What one way of working costs.

    Attributes:
        name: of the way.
        distinct: variants made.
        generator_hours: device-hours, over all generators.
        wall_hours: until the first run has ended.
        next_wall_hours: until a second run with the same store has ended.
        stored: variants that lie on disk afterwards.
        reuse: slots a distinct variant.
    """

    name: str
    distinct: float
    generator_hours: float
    wall_hours: float
    next_wall_hours: float
    stored: float
    reuse: float


def plan_costs(setting: Setting) -> list[Cost]:
    """Returns the cost of online fresh, offline K, and a pool refreshed within a budget, in this order."""
    return [_online(setting), _offline(setting), _budgeted(setting)]


def _online(setting: Setting) -> Cost:
    """A new variant for every slot, generated while the training waits for what is late."""
    hours = setting.generator_hours(setting.slots)
    wall = max(hours / setting.generators, setting.trainer_hours)
    return Cost("online, fresh", setting.slots, hours, wall, wall, 0.0, 1.0 if setting.slots else 0.0)


def _offline(setting: Setting) -> Cost:
    """K variants of every image, made before the training begins; every later run finds them."""
    made = float(setting.images * setting.variants)
    hours = setting.generator_hours(made)
    wall = hours / setting.generators + setting.trainer_hours
    reuse = setting.slots / made
    return Cost(f"offline, K = {setting.variants}", made, hours, wall, setting.trainer_hours, made, reuse)


def _budgeted(setting: Setting) -> Cost:
    """What the generators make while the training goes on without waiting, used again where nothing newer is there."""
    most = setting.trainer_hours * setting.generators
    hours = min(most, most if setting.budget is None else setting.budget, setting.generator_hours(setting.slots))
    made = hours * HOUR * setting.generator_rate
    reuse = setting.slots / made if made else 0.0
    return Cost("budgeted refresh", made, hours, setting.trainer_hours, setting.trainer_hours, made, reuse)


def bytes_per_variant(size: int) -> dict[str, float]:
    """Returns estimates for a square RGB image: {"raw": exact, "png": ..., "jpeg": ...}; see ASSUMPTIONS.

    Args:
        size: side in pixels.
    """
    raw = 3.0 * size * size
    return {"raw": raw, "png": PNG_OF_RAW * raw, "jpeg": _jpeg_per_pixel(size) * size * size}


def _jpeg_per_pixel(size: int) -> float:
    """Interpolates linearly in the side; constant outside of the anchors."""
    anchors = JPEG_BYTES_PER_PIXEL
    for (low, below), (high, above) in itertools.pairwise(anchors):
        if size <= high:
            return below + (above - below) * max(0.0, (size - low) / (high - low))
    return anchors[-1][1]


def variant_size(recipe: Recipe, given: int | None) -> int:
    """Returns the side of the recipe's variants in pixels.

    Args:
        recipe: whose generator block, or a model that lies on this disk, may say it.
        given: by the user; wins.

    Raises:
        UserError: if nobody says it.
    """
    said = given or getattr(recipe.generator, "output_size", None) or getattr(recipe.generator, "image_size", None)
    if said is None:
        said = _native_size(str(getattr(recipe.generator, "model", "")))
    if said is None:
        raise UserError(
            "plan: the size of a variant is not known without loading the model; give it with --variant-size PIXELS, "
            "or set generator.output_size in the recipe"
        )
    return int(said)


def _native_size(model: str) -> int | None:
    """Returns the size that a diffusers folder on this disk generates, or None."""
    from genssl.generators import models as locate

    folder = locate.BUILTIN / model.removeprefix("builtin:") if model.startswith("builtin:") else Path(model)
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text())
        autoencoder = json.loads((folder / "vae" / "config.json").read_text())
        scale: int = 2 ** (len(autoencoder["block_out_channels"]) - 1)
        return int(unet["sample_size"]) * scale
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measured_rates(folder: Path) -> tuple[float | None, float]:
    """Returns the rates that a finished run measured: variants/s of its generator (None if it made none), images/s.

    The generator's is of the variants that it made and the seconds that its device spent on them.
    Both shared the machine if the run generated on it. The trainer's leaves out what it waited for variants.

    Raises:
        UserError: if the folder holds no finished run.
    """
    from genssl.config.load import load

    try:
        ledger: dict[str, Any] = json.loads((folder / "results.json").read_text())["ledger"]
        steps = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        # What it made, not what views got: of late variants many are made that no view takes, and from a store or a
        # pool one variant serves many views. Ledgers of the first versions counted views alone.
        made = ledger.get("variants_computed", ledger["variants_generated"] + ledger["variants_refreshed"])
        generating, training = ledger["generator_seconds"], ledger["trainer_seconds"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"--from {folder}: is no finished run ({error.__class__.__name__}: {error}); give a directory that "
            "`genssl run` wrote, or the rates with --generator-rate and --trainer-rate"
        ) from None
    if training <= 0:
        raise UserError(f"--from {folder}: its ledger has no training time; give the rate with --trainer-rate")
    batch = load(Recipe, folder / "recipe.yaml").train.batch_size
    return (made / generating if made and generating > 0 else None), steps * batch / training
