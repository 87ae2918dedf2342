"""Grids of images: sources beside their views and variants."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch

from genssl.base.files import write_atomically
from genssl.data.base import UInt8Array

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
