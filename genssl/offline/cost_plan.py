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
    """What a plan is made for."""

    images: int  # N, of the train split
    epochs: int  # E
    views: float  # v, variants that a step wants of each of its images, on average
    generator_rate: float  # R, variants a second of one generator
    trainer_rate: float  # T, images (pairs of views) a second of the trainer
    variants: int  # K, stored of each image
    generators: int = 1  # how many work side by side
    budget: float | None = None  # generator-hours for the refreshed pool; None: as long as the training takes
    size: int = 0  # side of a variant in pixels

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
    """What one way of working costs."""

    name: str  # of the way
    distinct: float  # variants made
    generator_hours: float  # device-hours, over all generators
    wall_hours: float  # until the first run has ended
    next_wall_hours: float  # until a second run with the same store has ended
    stored: float  # variants that lie on disk afterwards
    reuse: float  # slots a distinct variant


def plan_costs(setting: Setting) -> list[Cost]:
    """Returns the cost of online fresh, offline K, and a pool refreshed within a budget, in this order."""
    slots, training = setting.slots, setting.trainer_hours
    # A new variant for every slot, generated while the training waits for what is late.
    hours = setting.generator_hours(slots)
    wall = max(hours / setting.generators, training)
    online = Cost("online, fresh", slots, hours, wall, wall, 0.0, 1.0 if slots else 0.0)
    # K variants of every image, made before the training begins; every later run finds them.
    made = float(setting.images * setting.variants)
    hours = setting.generator_hours(made)
    wall = hours / setting.generators + training
    offline = Cost(f"offline, K = {setting.variants}", made, hours, wall, training, made, slots / made)
    # What the generators make while the training goes on without waiting, used again where nothing newer is there.
    most = training * setting.generators
    hours = min(most, most if setting.budget is None else setting.budget, setting.generator_hours(slots))
    made = hours * HOUR * setting.generator_rate
    refreshed = Cost("budgeted refresh", made, hours, training, training, made, slots / made if made else 0.0)
    return [online, offline, refreshed]


def bytes_per_variant(size: int) -> dict[str, float]:
    """Returns estimates for a square RGB image of `size` pixels: {"raw": exact, "png", "jpeg"}; see ASSUMPTIONS."""
    raw = 3.0 * size * size
    per_pixel = JPEG_BYTES_PER_PIXEL[-1][1]
    for (low, below), (high, above) in itertools.pairwise(JPEG_BYTES_PER_PIXEL):  # linear in the side between them
        if size <= high:
            per_pixel = below + (above - below) * max(0.0, (size - low) / (high - low))
            break
    return {"raw": raw, "png": PNG_OF_RAW * raw, "jpeg": per_pixel * size * size}


def variant_size(recipe: Recipe, given: int | None) -> int:
    """Returns the side of the recipe's variants in pixels: what the user has `given`, or else what the recipe says.

    Its generator block may say it, or a model that lies on this disk. Raises UserError if nobody does.
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
    from genssl.generators.models import BUILTIN

    folder = BUILTIN / model.removeprefix("builtin:") if model.startswith("builtin:") else Path(model)
    try:
        unet = json.loads((folder / "unet" / "config.json").read_text())
        autoencoder = json.loads((folder / "vae" / "config.json").read_text())
        scale: int = 2 ** (len(autoencoder["block_out_channels"]) - 1)
        return int(unet["sample_size"]) * scale
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measured_rates(folder: Path) -> tuple[float | None, float]:
    """Returns the rates that a finished run measured: variants/s of its generator (None if it made none), images/s.

    The generator's is of the variants that it made and the seconds that its device spent on them. Both shared the
    machine if the run generated on it. The trainer's leaves out what it waited for variants.
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
            f"--from {folder}: is not a finished run ({error.__class__.__name__}: {error}); give a directory that "
            "`genssl run` wrote, or the rates with --generator-rate and --trainer-rate"
        ) from None
    if training <= 0:
        raise UserError(f"--from {folder}: its ledger has no training time; give the rate with --trainer-rate")
    batch = load(Recipe, folder / "recipe.yaml").train.batch_size
    return (made / generating if made and generating > 0 else None), steps * batch / training
