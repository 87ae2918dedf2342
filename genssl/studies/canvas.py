"""What the figures of a study are drawn on: axes as wide as a phone's screen, markers, and a key below.

Arms go by their number in the study, since twenty labels fit in no plot; the key says which is which. Shape, hatching
or number always tell apart what colour does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from genssl.studies.model import Estimate
from genssl.training.report import Theme, new_figure

WIDTH, LINE = 3.8, 0.185  # inches: a figure, so that its text is as large as the page's on a phone; a line of text
SMALL = 9.0  # points
LONGEST = 50  # characters of a line
MARKERS = "osD^vPX"
Key = list[tuple[Artist, str]]


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn for any theme."""

    name: str  # of its file
    title: str
    caption: str  # how to read it
    alt: str  # what it shows, for those who do not see it
    draw: Callable[[Theme], Figure]


def figure_with_key(theme: Theme, height: float, key: Key, *, below: str = "", above: str = "") -> tuple[Figure, Axes]:
    """Returns a figure whose plot has a height in inches, with the names of its axes above and below, and its key."""
    labels = [textwrap.fill(label, LONGEST - 2, max_lines=2, placeholder=" …") for _, label in key]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure, axes = new_figure(theme, WIDTH, height + LINE * lines + 0.2, SMALL)
    small: dict[str, Any] = {"size": SMALL, "color": theme.soft}
    axes.set_xlabel(below, **small).set_parse_math(False)
    if above:  # where it need not be turned
        figure.suptitle(above, x=0.015, ha="left", **small).set_parse_math(False)
    legend = figure.legend(
        [artist for artist, _ in key],
        labels,
        loc="outside lower left",
        frameon=False,
        fontsize=SMALL,
        labelcolor=theme.ink,
        labelspacing=0.25,
        borderpad=0,
        handlelength=1.8,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure, axes


def colour(theme: Theme, number: int) -> str:
    """Returns the colour of the arm, or series, of a number."""
    return theme.colours[number % len(theme.colours)]


def marker(
    theme: Theme, number: int, estimate: Estimate | None = None, at: tuple[float, float] | None = None
) -> Line2D:
    """Returns the marker of an arm or series, hollow for a single seed; it is unlike those of the 41 numbers around."""
    edge = colour(theme, number)
    fill = theme.paper if estimate is not None and estimate.n == 1 else edge
    xs, ys = ([], []) if at is None else ([at[0]], [at[1]])
    shape = MARKERS[number % len(MARKERS)]
    return Line2D(xs, ys, linestyle="", marker=shape, color=edge, markerfacecolor=fill, markersize=6.5, zorder=4)


def halo(theme: Theme) -> list[withStroke]:
    """Returns what keeps text legible over lines."""
    return [withStroke(linewidth=2.5, foreground=theme.paper)]


def named(number: int, label: str) -> str:
    """Returns the number and label of an arm in one line; of a long label the ends, which tell it from others."""
    text = f"{number + 1}  {label}"
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2].rstrip()} \N{HORIZONTAL ELLIPSIS} {text[-(LONGEST // 2 - 3) :].lstrip()}"


def write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Writes text at a place in the axes' coordinates; what looks like TeX in it stays as it is."""
    axes.text(x, y, text, **({"size": SMALL} | style)).set_parse_math(False)
