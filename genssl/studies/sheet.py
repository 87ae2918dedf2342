"""What the figures of a study are drawn on: a sheet measured in inches, its colours, and where labels go.

A sheet is as wide as a phone's screen, so that its text is as large as the page's there.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

WIDTH = 3.8  # inches
DPI = 220
LINE = 0.185  # of a key, in inches
FONT, SMALL = 10.0, 9.0  # points
LONGEST = 50  # characters of a line
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Theme:
    """Colours of a page; `colours` stay apart for the colour-blind, and have contrast 3 or more with `paper`."""

    name: str
    paper: str
    ink: str
    soft: str
    line: str
    colours: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1d2430",
    "#5b6675",
    "#dde3ea",
    ("#2563a8", "#b4500f", "#0b7a5c", "#8a4fa3", "#7d6200", "#5b6675"),
)
DARK = Theme(
    "dark",
    "#14181e",
    "#e6eaf0",
    "#9aa6b5",
    "#39434f",
    ("#7db4ec", "#f2a071", "#5cc9a2", "#cfa5e6", "#e0c060", "#9aa6b5"),
)


def colour(theme: Theme, number: int) -> str:
    """Returns the colour of the arm, or series, of a number."""
    return theme.colours[number % len(theme.colours)]


def marker(number: int) -> str:
    """Returns a marker; with the colour of the same number it is unlike those of the 41 numbers around it."""
    return MARKERS[number % len(MARKERS)]


@dataclass(frozen=True)
class Entry:
    """One line of a key: a marker or a filled swatch of the colour of a number, or nothing, and what it stands for."""

    text: str
    number: int | None = None
    marker: str | None = None
    hatch: str = ""
    hollow: bool = False
    dashed: bool = False


@dataclass
class Sheet:
    """A figure of a given height for its plot, with a key below it.

    Attributes:
        theme: its colours.
        height: of the plot with its axis labels, in inches.
        key: entries below the plot.
    """

    theme: Theme
    height: float
    key: Sequence[Entry] = ()
    figure: Figure = field(init=False)

    def __post_init__(self) -> None:
        lines = [textwrap.wrap(entry.text, LONGEST - 2, max_lines=2, placeholder=" …") or [""] for entry in self.key]
        below = LINE * sum(map(len, lines)) + (0.12 if lines else 0)
        self.total = self.height + below
        self.figure = Figure(figsize=(WIDTH, self.total), dpi=DPI, facecolor=self.theme.paper)
        FigureCanvasAgg(self.figure)
        self._whole = self.figure.add_axes((0, 0, 1, 1), frameon=False, zorder=5)
        self._whole.set(xlim=(0, WIDTH), ylim=(0, self.total), xticks=[], yticks=[])
        y = below - LINE
        for entry, wrapped in zip(self.key, lines, strict=True):
            self._swatch(entry, y + 0.06)
            for text in wrapped:
                self.text(0.32, y, text, size=SMALL)
                y -= LINE

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Returns axes with these margins, in inches, within the plot's part of the sheet."""
        below = self.total - self.height
        rectangle = (
            left / WIDTH,
            (below + bottom) / self.total,
            (WIDTH - left - right) / WIDTH,
            (self.height - bottom - top) / self.total,
        )
        axes = self.figure.add_axes(rectangle, facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(self.theme.soft)
        axes.tick_params(colors=self.theme.soft, labelcolor=self.theme.ink, labelsize=SMALL, width=0.6)
        axes.grid(color=self.theme.line, linewidth=0.7)
        axes.set_axisbelow(True)
        return axes

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Writes text at a place in inches from the lower left corner; what looks like TeX in it stays as it is."""
        write(self._whole, x, y, text, **({"color": self.theme.ink, "size": FONT} | style))

    def title(self, text: str) -> None:
        """Names the vertical axis above the plot, where it need not be turned."""
        self.text(0.06, self.total - 0.17, text, color=self.theme.soft, size=SMALL)

    def below(self, text: str) -> None:
        """Names the horizontal axis."""
        style = {"color": self.theme.soft, "size": SMALL, "ha": "center"}
        self.text(WIDTH / 2, self.total - self.height + 0.08, text, **style)

    def tag(self, text: str, spot: tuple[float, float], centre: tuple[float, float]) -> None:
        """Writes a label of a point, with a line between them if they are apart; both places in points."""
        (x, y), (across, up) = spot, centre
        if math.dist(spot, centre) > 15:
            self._whole.plot([x / 72, across / 72], [y / 72, up / 72], color=self.theme.soft, linewidth=0.6)
        style = {"ha": "center", "va": "center", "size": SMALL, "weight": "bold"}
        self.text(across / 72, up / 72, text, path_effects=halo(self.theme), **style)

    def png(self) -> bytes:
        """Returns the picture."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    def _swatch(self, entry: Entry, y: float) -> None:
        if entry.dashed:
            self._whole.plot([0.06, 0.26], [y, y], color=self.theme.soft, linewidth=1.2, linestyle=(0, (3, 2)))
        elif entry.number is not None and entry.marker:
            draw_marker(self._whole, self.theme, 0.16, y, entry.number, entry.marker, hollow=entry.hollow)
        elif entry.number is not None:
            fill = fill_style(self.theme, entry.number, entry.hatch)
            self._whole.add_patch(Rectangle((0.06, y - 0.045), 0.2, 0.09, **fill))


def fill_style(theme: Theme, number: int, hatch: str) -> dict[str, Any]:
    """Returns how a bar of a series is filled."""
    return {"facecolor": colour(theme, number), "edgecolor": theme.paper, "hatch": hatch, "linewidth": 0}


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
    """Writes plain text at a place in the axes' coordinates."""
    axes.text(x, y, text, **style).set_parse_math(False)


def draw_marker(axes: Axes, theme: Theme, x: float, y: float, number: int, shape: str, *, hollow: bool) -> None:
    """Draws the marker of an arm or series, hollow if it stands for a single seed."""
    fill = theme.paper if hollow else colour(theme, number)
    axes.plot([x], [y], shape, color=colour(theme, number), markerfacecolor=fill, markersize=6.5, zorder=4)


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn for any theme.

    Attributes:
        name: of its file.
        title: its heading.
        caption: how to read it.
        alt: what it shows, for those who do not see it.
        draw: makes it.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Theme], Sheet]


# ---- Numbers beside points ----
@dataclass(frozen=True)
class Box:
    """A rectangle in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Returns the shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0) * max(height, 0)


DIRECTIONS = ((1, 0), (0.75, 0.75), (0.75, -0.75), (0, 1), (0, -1), (-1, 0), (-0.75, 0.75), (-0.75, -0.75))


def place(
    anchors: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], avoid: Sequence[Box], inside: Box
) -> list[tuple[float, float]]:
    """Chooses centres for labels near their points, such that they cover as little as possible.

    Args:
        anchors: the points, in points (1/72 inch).
        sizes: width and height of each label.
        avoid: what labels should not cover.
        inside: where they should stay.
    """
    taken: list[Box] = []
    centres = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        best: tuple[float, Box, tuple[float, float]] | None = None
        for radius in (10.0, 14.0, 19.0, 25.0, 32.0):
            for across, up in DIRECTIONS:
                cx, cy = x + across * (radius + width / 2 - 3), y + up * radius
                box = Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                covered = sum(box.overlap(other) for other in avoid) + 4 * sum(box.overlap(other) for other in taken)
                outside = width * height - box.overlap(inside)
                cost = covered + 4 * outside + 0.6 * radius
                if best is None or cost < best[0]:
                    best = (cost, box, (cx, cy))
        assert best is not None
        taken.append(best[1])
        centres.append(best[2])
    return centres
