"""Draws what a recipe would feed to its encoder, without training."""

from __future__ import annotations

from pathlib import Path

from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.runtime import pick_device, set_threads
from genssl.training.planning import view_plan
from genssl.training.samples import draw_run_samples
from genssl.training.sources import open_source
from genssl.training.splits import load_splits
from genssl.variants.ledger import Ledger
from genssl.views.augmentations import Augmentations


def preview(recipe: Recipe, out: Path) -> None:
    """Writes a PNG of sources, views and variants; generates in this process unless the recipe names a running server.

    Raises:
        UserError: if data or generator cannot be had, or the picture cannot be written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    if recipe.variants.server == "embedded" and recipe.variants.source == "online":
        recipe = recipe.model_copy(update={"variants": recipe.variants.model_copy(update={"source": "in_process"})})
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        set_threads(recipe.train.threads)
    dataset = load_splits(recipe.model_copy(update={"evaluate": []})).train
    with open_source(recipe, dataset, Ledger(), device, None) as opened:
        augmentations = Augmentations(recipe.views, dataset.image_size)
        draw_run_samples(
            out, recipe, dataset, view_plan(recipe, len(dataset)), opened.source if opened else None, augmentations
        )
