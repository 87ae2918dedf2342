"""Draws what a recipe would feed to its encoder, without training; also variants over chosen parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from genssl.base.devices import pick_device, set_threads
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.data.load import left_out_note
from genssl.errors import RequestRefusedError, UserError
from genssl.evaluators.splits import load_splits
from genssl.generators.configs import ADAPTIVE, ADAPTS
from genssl.generators.models import small_variants
from genssl.generators.parameters import ADAPTIVE_NAME, MAX, Parameters, merge
from genssl.quality.grid import ColumnGroup, write_groups
from genssl.training.samples import draw_run_samples, sources_and_views, variant_indices
from genssl.training.supply.open import open_source
from genssl.training.supply.steps import view_plan
from genssl.variants.engine import Row, Settings, VariantEngine
from genssl.variants.in_process import load_engine
from genssl.variants.ledger import Ledger
from genssl.variants.plan import ViewPlan
from genssl.views.augmentations import Augmentations

VIEWS, VARIANTS = 2, 2
MOST_SETTINGS = 32  # beside each other in one picture


@dataclass(frozen=True)
class VariedParameter:
    """A generator's parameter and the values that it is drawn at: by label, what a request says."""

    name: str
    values: dict[str, Parameters]


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
        if warn := recipe.unsuited() or small_variants(engine.generator.spec.image_size, dataset.image_size):
            report(f"warning: {warn}")
        draw_parameters(out, recipe, dataset, plan, engine, augmentations, varied, sources)
        return
    with open_source(recipe, dataset, Ledger(), device, None) as opened:
        if opened and (warn := recipe.unsuited() or opened.smaller_than(dataset.image_size)):
            report(f"warning: {warn}")
        draw_run_samples(out, recipe, dataset, plan, opened.source if opened else None, augmentations, sources)


def parse_vary(text: str) -> VariedParameter:
    """Reads "NAME=VALUE,VALUE,...": numbers, ranges "2..8" of which each row draws, and, for the noise level, adaptive.

    Raises:
        UserError: if it is anything else.
    """
    name, mark, written = text.partition("=")
    labels = [label.strip() for label in written.split(",")]
    name = name.strip()
    if not mark or not name or not all(labels):
        raise UserError(f"--vary {text}: give a parameter and its values, such as --vary noise_level=0,200,400")
    return VariedParameter(name, {label: _value(name, label, text) for label in labels})


def _value(name: str, label: str, text: str) -> Parameters:
    if label == ADAPTIVE and name == ADAPTS:
        return {ADAPTS: 0, ADAPTIVE_NAME: 1}
    low, mark, high = label.partition("..")
    try:
        return {name: float(low), name + MAX: float(high)} if mark else {name: float(label)}
    except ValueError:
        only = ", or adaptive" if name == ADAPTS else ""
        raise UserError(f"--vary {text}: {label!r} is not a number and not a range such as 2..8{only}") from None


def draw_parameters(
    path: Path,
    recipe: Recipe,
    dataset: ImageDataset,
    plan: ViewPlan,
    engine: VariantEngine,
    augmentations: Augmentations,
    varied: Sequence[VariedParameter],
    sources: int,
) -> None:
    """Draws all combinations of parameters: the values of the last are columns, those of the others are groups.

    All variants of a row have the seed of the first variant of the recipe, so that along a row nothing differs but the
    parameters.

    Raises:
        UserError: for parameters that the generator does not have or cannot do, or too many combinations.
    """
    if (count := prod(len(one.values) for one in varied)) > MOST_SETTINGS:
        raise UserError(f"--vary: {count} combinations are too many for a picture; {MOST_SETTINGS} are the most")
    given = [one.name for one in varied]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise UserError(f"--vary: {', '.join(twice)} is given twice; give all its values at once")
    *outer, inner = varied
    combinations: list[tuple[str, dict[str, Settings]]] = []  # a heading, and settings by label
    for labels in product(*(one.values for one in outer)):
        fixed: Parameters = {}
        for one, label in zip(outer, labels, strict=True):
            fixed = merge(fixed, one.values[label])
        heading = ", ".join([*(f"{one.name} {label}" for one, label in zip(outer, labels, strict=True)), inner.name])
        settings = {label: _complete(engine, merge(fixed, value)) for label, value in inner.values.items()}
        combinations.append((heading, settings))

    rows = [int(row) for row in plan.step(0, 0).rows[:sources]]
    (_, images), *views = sources_and_views(recipe, dataset, rows, augmentations, VIEWS)
    names = [dataset.source_id(row) for row in rows]
    embeddings, _ = engine.embed([engine.generator.preprocess(decode(dataset.stored(row))) for row in rows])

    def engine_rows(settings: Settings, index: int, seeds: Sequence[int | None]) -> list[Row]:
        sources = zip(names, embeddings, seeds, strict=True)
        return [engine.row(name, embedding, index, settings, seed) for name, embedding, seed in sources]

    unset, own, indices = [None] * len(rows), engine.complete({}), variant_indices(recipe, VARIANTS)
    seeds = [row.seed for row in engine_rows(own, indices[0], unset)]
    plain = [(f"{n}", _generate(engine, engine_rows(own, index, unset))) for n, index in enumerate(indices, start=1)]
    groups = [
        ColumnGroup("source", [("", images)]),
        ColumnGroup("standard views", views),
        ColumnGroup("variants", plain),
    ]
    for heading, settings in combinations:
        columns, notes = [], {}
        for label, chosen in settings.items():
            drawn = engine_rows(chosen, indices[0], seeds)
            columns.append((label, _generate(engine, drawn)))
            if chosen.variation is not None and (chosen.variation.adaptive or inner.name in chosen.variation.ranges):
                notes[label] = [f"{row.settings.parameters[inner.name]:.3g}" for row in drawn]
        groups.append(ColumnGroup(heading, columns, notes))
    spec = engine.generator.spec
    elsewhere = ", ".join(f"{name} {value:g}" for name, value in spec.defaults.items() if "size" not in name)
    write_groups(
        path,
        groups,
        f"{recipe.name}: variants by {spec.name} {re.sub('^builtin:', '', spec.model)}",
        f"elsewhere {elsewhere}; under a parameter nothing else changes along a row, not even the seed",
    )


def _complete(engine: VariantEngine, given: Parameters) -> Settings:
    try:
        return engine.complete(given)
    except RequestRefusedError as error:
        raise UserError(f"--vary: {error}") from None


def _generate(engine: VariantEngine, rows: Sequence[Row]) -> list[UInt8Array]:
    made: dict[int, UInt8Array] = {}
    for positions in engine.batches(rows):
        images, _ = engine.generate([rows[position] for position in positions])
        made.update(zip(positions, images, strict=True))
    return [made[position] for position in range(len(rows))]
