"""Pictures of sources beside their views and variants."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from genssl.base.devices import stream
from genssl.base.files import write_atomically
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset, UInt8Array
from genssl.variants.plan import ViewPlan, fresh_indices, variant_columns
from genssl.variants.source import VariantRequest, VariantSource
from genssl.views.augmentations import Augmentations

ROWS, VIEW_COLUMNS, VARIANT_COLUMNS = 8, 3, 6
CELL, GAP = 0.95, 0.25  # inches: an image, and what is between groups of columns
INK, QUIET = "#222222", "#777777"
CORNER = {"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9}
Column = tuple[str, Sequence[UInt8Array]]  # a label, and uint8 [3, h, w] a source


@dataclass(frozen=True)
class ColumnGroup:
    """Columns of images under one heading; `notes` are words in the corner of each image of a column, by its label."""

    heading: str
    columns: Sequence[Column]
    notes: dict[str, list[str]] = field(default_factory=dict)


def draw_run_samples(
    path: Path,
    recipe: Recipe,
    dataset: ImageDataset,
    plan: ViewPlan,
    source: VariantSource | None,
    augmentations: Augmentations,
    count: int = ROWS,
) -> None:
    """Draws `count` sources of the first batch, standard views, and the first variants that a run of the recipe uses.

    Without a source of variants only views are drawn.
    """
    rows = [int(row) for row in plan.step(0, 0).rows[:count]]
    columns = sources_and_views(recipe, dataset, rows, augmentations, VIEW_COLUMNS)
    sources = columns[0][1]
    if source is not None:
        indices = variant_indices(recipe, VARIANT_COLUMNS)
        requests = [VariantRequest(row, dataset.source_id(row), index) for index in indices for row in rows]
        source.announce(requests)
        delivery = source.take(requests)
        taken = iter(delivery.images)
        images = [
            sources[slot % len(rows)] if origin == "real" else next(taken)
            for slot, origin in enumerate(delivery.origins)
        ]
        for number in range(len(indices)):
            columns.append((f"variant {number + 1}", images[number * len(rows) : (number + 1) * len(rows)]))
    if recipe.uses_variants() and recipe.generator is not None:
        made_by = f"{recipe.generator.name} {getattr(recipe.generator, 'model', '')}"
        title = f"{recipe.name}: sources, standard views, and variants by {made_by}"
    else:
        title = f"{recipe.name}: sources and their standard views (no variants)"
    write_grid(path, columns, title)


def sources_and_views(
    recipe: Recipe, dataset: ImageDataset, rows: Sequence[int], augmentations: Augmentations, views: int
) -> list[Column]:
    """Returns the columns of the sources, and of so many standard views of them."""
    sources = np.stack([dataset.image(row) for row in rows])
    pixels = torch.from_numpy(sources).float() / 255
    columns: list[Column] = [("source", list(sources))]
    for number in range(views):
        made = augmentations.real(number)(pixels, stream("samples", recipe.seed, number))
        columns.append((f"view {number + 1}", list((made * 255).round().to(torch.uint8).numpy())))
    return columns


def variant_indices(recipe: Recipe, count: int) -> list[int]:
    """Returns the first indices of a source that the recipe's runs use."""
    if recipe.variants.per_image != "fresh":
        return list(range(min(count, recipe.variants.per_image)))
    columns, variant = variant_columns(recipe.views.policy, recipe.views.third_count)
    last = variant[-1] if variant else columns - 1
    return [int(fresh_indices(recipe.seed, epoch, columns)[last]) for epoch in range(count)]


def write_grid(path: Path, columns: Sequence[Column], title: str) -> None:
    """Writes a labelled grid of images uint8 [3, h, w]; images of different sizes are drawn equally large."""
    write_groups(path, [ColumnGroup("", columns)], title, dpi=120)


def write_groups(path: Path, groups: Sequence[ColumnGroup], title: str, note: str = "", dpi: int = 150) -> None:
    """Writes groups of columns of images beside each other, each under its heading and a rule, as a PNG."""
    rows, count = len(groups[0].columns[0][1]), sum(len(group.columns) for group in groups)
    # As wide as what they stand above.
    title, note = textwrap.fill(title, 15 * count), textwrap.fill(note, 18 * count)
    headings = [textwrap.fill(group.heading, 16 * len(group.columns)) for group in groups]
    head = "\n" * max(heading.count("\n") + 2 if heading else 0 for heading in headings)
    lines = (title + note + head).count("\n") + 2
    size = (CELL * count + GAP * (len(groups) - 1), CELL * rows + 0.3 + 0.15 * lines)
    figure = Figure(figsize=size, dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9, color=INK)
    if note:
        figure.supxlabel(note, fontsize=7, color=QUIET)
    widths = [width for group in groups for width in (*[CELL] * len(group.columns), GAP)][:-1]
    grid = figure.add_gridspec(rows, len(widths), width_ratios=widths)
    start = 0
    for group, heading in zip(groups, headings, strict=True):
        tops: list[Axes] = []
        for column, (label, images) in enumerate(group.columns, start=start):
            for row, image in enumerate(images):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
                axes.set_axis_off()
                if label in group.notes:
                    axes.text(0.04, 0.04, group.notes[label][row], transform=axes.transAxes, fontsize=6, bbox=CORNER)
                if row == 0:  # above the label there is room for the heading
                    axes.set_title(head + (label or " "), fontsize=8, color=INK)
                    tops.append(axes)
        if heading:
            above: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False, "fontsize": 8}
            text = tops[0].annotate(heading, (0, 1), (0, 21), "axes fraction", color=INK, **above)
            text.set_in_layout(False)  # it is wider than its first column
            rule = ConnectionPatch(
                (0, 1.24), (1, 1.24), "axes fraction", "axes fraction", axesA=tops[0], axesB=tops[-1]
            )
            rule.set_in_layout(False)
            figure.add_artist(rule)
        start += len(group.columns) + 1
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))
