"""Sources, their standard views, and their variants over chosen parameters, as one labelled picture."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from genssl.base.files import write_atomically
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.errors import RequestRefusedError, UserError
from genssl.generators.configs import ADAPTIVE, ADAPTS
from genssl.generators.parameters import ADAPTIVE_NAME, MAX, Parameters, merge
from genssl.training.samples import sources_and_views, variant_indices
from genssl.variants.engine import Row, Settings, VariantEngine
from genssl.variants.plan import ViewPlan
from genssl.views.augmentations import Augmentations

VIEWS, VARIANTS = 2, 2
MOST_SETTINGS = 32  # beside each other in one picture
# In inches: an image, the gaps between images and between groups, and the margins.
CELL, GAP, GROUP_GAP, MARGIN, HEAD, TITLE = 0.9, 0.05, 0.26, 0.12, 0.44, 0.42
NOTE_LINE, NOTE_CHARACTER = 0.12, 0.052
INK, QUIET = "#222222", "#777777"
CORNER = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9}


@dataclass(frozen=True)
class Vary:
    """One parameter and the values that it is drawn at.

    Attributes:
        name: of the parameter.
        values: by label, what a request says.
    """

    name: str
    values: dict[str, Parameters]


@dataclass(frozen=True)
class Group:
    """Columns under one heading, each a label and uint8 [3, h, w] a source.

    Attributes:
        heading: over the columns.
        columns: labels and images.
        notes: by label, words in the corner of each image of that column.
    """

    heading: str
    columns: Sequence[tuple[str, Sequence[UInt8Array]]]
    notes: dict[str, list[str]] = field(default_factory=dict)


def parse_vary(text: str) -> Vary:
    """Reads "NAME=VALUE,VALUE,...": numbers, ranges "2..8" of which each row draws, and, for the noise level, adaptive.

    Raises:
        UserError: if it is anything else.
    """
    name, mark, written = text.partition("=")
    labels = [one.strip() for one in written.split(",")]
    name = name.strip()
    if not mark or not name or not all(labels):
        raise UserError(f"--vary {text}: give a parameter and its values, such as --vary noise_level=0,200,400")
    return Vary(name, {label: _value(name, label, text) for label in labels})


def _value(name: str, label: str, text: str) -> Parameters:
    if label == ADAPTIVE and name == ADAPTS:
        return {ADAPTS: 0, ADAPTIVE_NAME: 1}
    low, mark, high = label.partition("..")
    try:
        return {name: float(low), name + MAX: float(high)} if mark else {name: float(label)}
    except ValueError:
        only = ", or adaptive" if name == ADAPTS else ""
        raise UserError(f"--vary {text}: {label!r} is no number and no range such as 2..8{only}") from None


def draw_parameters(
    path: Path,
    recipe: Recipe,
    dataset: ImageDataset,
    plan: ViewPlan,
    engine: VariantEngine,
    augmentations: Augmentations,
    varied: Sequence[Vary],
    sources: int,
) -> None:
    """Draws a row for each of the first sources of a run.

    All variants of a row under `varied` have the seed of the first variant of the recipe, so that along a row nothing
    differs but the parameter.

    Args:
        path: of the PNG.
        recipe: has the other parameters.
        dataset: has the sources.
        plan: says which come first.
        engine: makes the variants.
        augmentations: make the views.
        varied: all combinations of their values; of the last the columns, of the others the groups.
        sources: how many rows.

    Raises:
        UserError: for parameters that the generator does not have or cannot do, or too many combinations.
    """
    if (count := prod(len(one.values) for one in varied)) > MOST_SETTINGS:
        raise UserError(f"--vary: {count} combinations are too many for a picture; {MOST_SETTINGS} are the most")
    if twice := sorted({one.name for one in varied if [each.name for each in varied].count(one.name) > 1}):
        raise UserError(f"--vary: {', '.join(twice)} is given twice; give all its values at once")
    *outer, inner = varied
    settings = [
        (labels, {label: _complete(engine, merge(given, value)) for label, value in inner.values.items()})
        for labels, given in _combinations(outer)
    ]
    rows = [int(row) for row in plan.step(0, 0).rows[:sources]]
    (_, images), *views = sources_and_views(recipe, dataset, rows, augmentations, VIEWS)
    names = [dataset.source_id(row) for row in rows]
    preprocess = engine.generator.preprocess
    embeddings, _ = engine.embed([preprocess(decode(dataset.stored(row))) for row in rows])
    own, indices = engine.complete({}), variant_indices(recipe, VARIANTS)

    def asked(settings: Settings, index: int, seeds: Sequence[int] | None = None) -> list[Row]:
        return [
            engine.row(name, embedding, index, settings, None if seeds is None else seeds[number])
            for number, (name, embedding) in enumerate(zip(names, embeddings, strict=True))
        ]

    seeds = [engine.row(names[one], embeddings[one], indices[0], own).seed for one in range(len(rows))]
    groups = [
        Group("source", [("", images)]),
        Group("standard views", views),
        Group(
            "variants",
            [(f"{number + 1}", _generate(engine, asked(own, index))) for number, index in enumerate(indices)],
        ),
    ]
    for said, completed in settings:
        columns, notes = [], {}
        for label, each in completed.items():
            drawn = asked(each, indices[0], seeds)
            columns.append((label, _generate(engine, drawn)))
            if each.variation is not None and (each.variation.adaptive or inner.name in each.variation.ranges):
                notes[label] = [f"{row.settings.parameters[inner.name]:.3g}" for row in drawn]
        groups.append(Group(", ".join([*said, inner.name]), columns, notes))
    write_groups(path, groups, _title(recipe, engine), _stated(engine.generator.spec.defaults))


def write_groups(path: Path, groups: Sequence[Group], title: str, note: str) -> None:
    """Writes groups of columns of images uint8 [3, h, w] beside each other, each under its heading and a rule."""
    rows = len(groups[0].columns[0][1])
    columns = sum(len(group.columns) for group in groups)
    wide = 2 * MARGIN + columns * CELL + (columns - len(groups)) * GAP + (len(groups) - 1) * GROUP_GAP
    lines = textwrap.wrap(note, max(20, int((wide - 2 * MARGIN) / NOTE_CHARACTER)))
    title_high = TITLE + (len(lines) - 1) * NOTE_LINE
    high = title_high + HEAD + rows * CELL + (rows - 1) * GAP + MARGIN
    figure = Figure(figsize=(wide, high), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(MARGIN / wide, 1 - 0.09 / high, title, va="top", fontsize=9, fontweight="bold", color=INK)
    figure.text(MARGIN / wide, 1 - 0.27 / high, "\n".join(lines), va="top", fontsize=7, linespacing=1.2, color=QUIET)
    left = MARGIN
    for group in groups:
        width = len(group.columns) * CELL + (len(group.columns) - 1) * GAP
        top = high - title_high - 0.03
        figure.text(left / wide, (top - 0.02) / high, group.heading, va="top", fontsize=8, color=INK)
        rule = (top - 0.19) / high
        figure.add_artist(_line(left / wide, (left + width) / wide, rule))
        for number, (label, images) in enumerate(group.columns):
            start = left + number * (CELL + GAP)
            figure.text(
                (start + CELL / 2) / wide, (top - 0.36) / high, label, ha="center", va="bottom", fontsize=7.5, color=INK
            )
            for row, image in enumerate(images):
                bottom = high - title_high - HEAD - row * (CELL + GAP) - CELL
                axis = figure.add_axes((start / wide, bottom / high, CELL / wide, CELL / high))
                axis.imshow(image.transpose(1, 2, 0), interpolation="nearest", aspect="auto")
                axis.set_axis_off()
                if label in group.notes:
                    said = group.notes[label][row]
                    axis.text(0.04, 0.04, said, transform=axis.transAxes, fontsize=6, color=INK, bbox=CORNER)
        left += width + GROUP_GAP
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def _line(start: float, end: float, height: float) -> Line2D:
    return Line2D([start, end], [height, height], color=INK, linewidth=0.6)


def _combinations(varied: Sequence[Vary]) -> list[tuple[list[str], Parameters]]:
    """Returns what each combination is called, a phrase a parameter, and what a request says of it."""
    found: list[tuple[list[str], Parameters]] = [([], {})]
    for one in varied:
        found = [
            ([*said, f"{one.name} {label}"], merge(given, value))
            for said, given in found
            for label, value in one.values.items()
        ]
    return found


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


def _title(recipe: Recipe, engine: VariantEngine) -> str:
    spec = engine.generator.spec
    return f"{recipe.name}: variants by {spec.name} {re.sub('^builtin:', '', spec.model)}"


def _stated(defaults: Parameters) -> str:
    """Returns the recipe's parameters in words."""
    said = ", ".join(f"{name} {value:g}" for name, value in defaults.items() if "size" not in name)
    return f"elsewhere {said}; under a parameter nothing else changes along a row, not even the seed"
