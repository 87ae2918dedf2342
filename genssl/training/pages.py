"""What the pages of a run and of a study share: their template, their colours, and pictures inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from genssl.base.files import write_atomically

DPI = 220


@dataclass(frozen=True)
class Theme:
    """Colours of a page; `colours` stay apart for the colour-blind, and have contrast 3 or more with `paper`."""

    paper: str
    ink: str
    soft: str
    line: str
    colours: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1d2430",
    soft="#5b6675",
    line="#dde3ea",
    colours=("#2563a8", "#b4500f", "#0b7a5c", "#8a4fa3", "#7d6200", "#5b6675"),
)
DARK = Theme(
    paper="#14181e",
    ink="#e6eaf0",
    soft="#9aa6b5",
    line="#39434f",
    colours=("#7db4ec", "#f2a071", "#5cc9a2", "#cfa5e6", "#e0c060", "#9aa6b5"),
)
LEDGER_WORDS = {
    "variants_generated": "views made of a variant that was generated for them",
    "variants_computed": "variants that the generator made for this run, used or not",
    "variants_from_store": "variants taken from a store",
    "variants_reused": "variants used again because the planned one was late",
    "fallbacks_to_real": "views that fell back to the real image",
    "distinct_variants": "distinct variants",
    "fresh_fraction": "planned variants that arrived as planned",
    "reuse_mean": "how often a variant that was used again stood in for others, on average",
    "reuse_max": "how often one did at most",
    "variants_dropped": "planned variants whose step passed before they were asked for",
    "variants_redrawn": "draws that the drift guard added",
    "variants_refreshed": "variants generated ahead of the plan",
    "stall_seconds": "seconds the training waited for variants",
    "generator_seconds": "seconds of the generator's device",
    "trainer_seconds": "seconds of training, waiting left out",
    "bytes_received": "bytes of variants received",
    "calls": "calls to the generator",
    "retries": "calls repeated because the server was away or overloaded",
    "prefetch_depth": "steps ahead that variants were asked for, at the end",
    "fetch_seconds_p50": "seconds a request for variants took, median of the latest",
    "fetch_seconds_p95": "seconds within which 95 % of them were answered",
}


def ledger_words(name: str) -> str:
    """Returns what a key of the ledger counts, in words."""
    if name.startswith("retries_"):
        return f"of these, because the server was {name.removeprefix('retries_')}"
    return LEDGER_WORDS.get(name, name.replace("_", " "))


def write_page(path: Path, package: str, helpers: dict[str, Callable[..., Any]], **content: Any) -> None:
    """Writes the page of `report.html.j2` in the folder `templates` of a package, which extends `page.html.j2` here.

    Args:
        path: of the page.
        package: such as "genssl.studies".
        helpers: functions that the template and its macros call, by name.
        content: what the page shows.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("genssl.training")]),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(helpers)
    page = environment.get_template("report.html.j2").render(content)
    write_atomically(path, lambda partial: partial.write_text(page, encoding="utf-8"))


def new_figure(theme: Theme, width: float, height: float, font_size: float) -> tuple[Figure, Axes]:
    """Returns a figure of a size in inches, laid out by matplotlib, and its axes in the colours of a page."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.soft)
    axes.tick_params(colors=theme.soft, labelcolor=theme.ink, labelsize=font_size, width=0.6)
    axes.grid(color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def png_of(figure: Figure) -> bytes:
    """Returns a figure as a PNG, whose bytes do not depend on when or by which version it was drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def embed(png: bytes) -> str:
    """Returns a picture as the address that an `img` of the page has."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
