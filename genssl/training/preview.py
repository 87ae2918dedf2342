"""Draws what a recipe would feed to its encoder, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from genssl.base.devices import pick_device, set_threads
from genssl.config.recipe import Recipe
from genssl.data.load import left_out_note
from genssl.errors import UserError
from genssl.evaluators.splits import load_splits
from genssl.generators.models import small_variants
from genssl.training.parameter_grid import draw_parameters, parse_vary
from genssl.training.samples import draw_run_samples
from genssl.training.supply.open import open_source
from genssl.training.supply.planning import view_plan
from genssl.variants.generated import load_engine
from genssl.variants.ledger import Ledger
from genssl.views.augmentations import Augmentations


def preview(
    recipe: Recipe,
    out: Path,
    vary: Sequence[str] = (),
    sources: int = 8,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a PNG of sources, views and variants; generates in this process unless the recipe names a running server.

    Args:
        recipe: of the run.
        out: of the PNG.
        vary: "NAME=VALUE,VALUE,..." of generator parameters; every combination is drawn, always in this process.
        sources: rows of the picture.
        report: is told what speaks against the generator, and which files are left out.

    Raises:
        UserError: if data or generator cannot be had, the generator has no such parameter, or the picture cannot be
            written.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    varied = [parse_vary(text) for text in vary]
    if varied and recipe.generator is None:
        raise UserError("--vary: the recipe has no generator; add a generator block")
    if recipe.variants.server == "embedded" and recipe.variants.source == "online":
        recipe = recipe.model_copy(update={"variants": recipe.variants.model_copy(update={"source": "in_process"})})
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        set_threads(recipe.train.threads)
    dataset = load_splits(recipe.model_copy(update={"evaluate": []})).train
    plan, augmentations = view_plan(recipe, len(dataset)), Augmentations(recipe.views, dataset.image_size)
    if note := left_out_note(dataset):
        report(note)
    if varied:
        engine = load_engine(recipe, device)
        warn = recipe.unsuited() or small_variants(engine.generator.spec.image_size, dataset.image_size)
        if warn:
            report(f"warning: {warn}")
        draw_parameters(out, recipe, dataset, plan, engine, augmentations, varied, sources)
        return
    with open_source(recipe, dataset, Ledger(), device, None) as opened:
        if opened and (warn := recipe.unsuited() or opened.smaller_than(dataset.image_size)):
            report(f"warning: {warn}")
        draw_run_samples(out, recipe, dataset, plan, opened.source if opened else None, augmentations, sources)
