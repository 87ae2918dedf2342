"""Draws what a recipe would feed to its encoder, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.generators.base import Parameters
from genssl.runtime import pick_device, set_threads
from genssl.training.generated_variants import load_engine
from genssl.training.planning import view_plan
from genssl.training.samples import draw_run_samples, draw_settings
from genssl.training.sources import open_source
from genssl.training.splits import load_splits
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.views.augmentations import Augmentations

MOST_SETTINGS = 12  # beside each other in one picture


def preview(recipe: Recipe, out: Path, vary: Mapping[str, Sequence[float]] | None = None) -> None:
    """Writes a PNG of sources, views and variants; generates in this process unless the recipe names a running server.

    Args:
        recipe: of the run.
        out: of the PNG.
        vary: values of generator parameters; every combination is drawn, by the generator in this process.

    Raises:
        UserError: if data or generator cannot be had, the generator has no such parameter, or the picture cannot be
            written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    varied = vary or {}
    settings: list[Parameters] = [
        dict(zip(varied, values, strict=True)) for values in product(*varied.values()) if values
    ]
    if len(settings) > MOST_SETTINGS:
        raise UserError(
            f"--vary: {len(settings)} combinations are too many for a picture; {MOST_SETTINGS} are the most"
        )
    if settings and recipe.generator is None:
        raise UserError("--vary: the recipe has no generator; add a generator block")
    if recipe.variants.server == "embedded" and recipe.variants.source == "online":
        recipe = recipe.model_copy(update={"variants": recipe.variants.model_copy(update={"source": "in_process"})})
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        set_threads(recipe.train.threads)
    dataset = load_splits(recipe.model_copy(update={"evaluate": []})).train
    plan, augmentations = view_plan(recipe, len(dataset)), Augmentations(recipe.views, dataset.image_size)
    if settings:
        engine = load_engine(recipe, device)
        sources = [InProcessSource(engine, dataset, Ledger(), one) for one in settings]
        draw_settings(out, recipe, dataset, plan, augmentations, list(zip(settings, sources, strict=True)))
        return
    with open_source(recipe, dataset, Ledger(), device, None) as opened:
        draw_run_samples(out, recipe, dataset, plan, opened.source if opened else None, augmentations)
