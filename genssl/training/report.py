"""report.html: one self-contained page about a run, beside the finished run without variants where there is one.

What such a page is made of (its colours, its template, pictures inside it) serves the page of a study as well.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from genssl.base.files import write_atomically
from genssl.base.wording import counted
from genssl.config.comparable import baseline_of
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.evaluators.units import difference_shown, is_detail, shown, unit_of

MOST_LOOKED_AT = 1000  # directories, so that a folder of many runs does not hold up a report

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
    "views_generated": "views made of a variant that was generated for them",
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


@dataclass(frozen=True)
class BaselineRun:
    """A run without variants that differs from another one in nothing else."""

    folder: Path
    name: str  # of the directory as the other run's reader knows it, such as "../none"
    results: dict[str, Any]
    epochs: list[dict[str, Any]]  # rows of its metrics.jsonl


def write_report(out: Path, recipe: Recipe, results: dict[str, Any]) -> None:
    """Writes report.html from the run's results, metrics.jsonl and samples.png, and from its baseline's."""
    epochs = _read_lines(out / "metrics.jsonl")
    baseline = find_baseline(out, recipe, results)
    has_variants = results["provenance"]["variants"]["source"] != "none"
    counts = [
        (ledger_words(name), _number(name, value), value)
        for name, value in results["ledger"].items()
        if name != "variants_generated"  # the old name of views_generated
        and (has_variants or name != "prefetch_depth")  # which is never 0, and nothing is asked for
    ]
    dataset = results["provenance"].get("dataset", {})
    images = f", {counted(dataset['images'], 'training image')}" if "images" in dataset else ""
    write_page(
        out / "report.html",
        "genssl.training",
        {},
        results=results,
        seed=recipe.seed,
        rows=_rows(results["metrics"], baseline.results["metrics"] if baseline else {}),
        protocols=[(name, *_protocol(facts)) for name, facts in results["protocol"].items()],
        baseline=baseline,
        ledger=[(words, text) for words, text, value in counts if value],
        nothing=[words for words, _, value in counts if not value],
        has_variants=has_variants,
        samples=embed((out / "samples.png").read_bytes()),
        light=embed(png_of(draw_loss(epochs, baseline, LIGHT))),
        dark=embed(png_of(draw_loss(epochs, baseline, DARK))),
        length=counted(len(epochs), "epoch"),
        images=dataset.get("name", "") + images,
        last=epochs[-1],
        provenance=json.dumps(results["provenance"], indent=2),
        recipe=json.dumps(recipe.model_dump(mode="json"), indent=2),
    )


# ---- The baseline ----
def find_baseline(out: Path, recipe: Recipe, results: dict[str, Any]) -> BaselineRun | None:
    """Returns the baseline of a run, the latest if there are several; None if there is none, or it is one itself.

    Looked at are the directories beside it, and in a study the runs of other arms at its seed.
    """
    if not recipe.uses_variants():
        return None
    wanted, out = baseline_of(recipe), out.resolve()
    found = [run for folder in _finished_beside(out) if (run := _read_baseline(folder, out, wanted, results))]
    return max(found, key=lambda run: (run.folder / "results.json").stat().st_mtime_ns, default=None)


def _finished_beside(out: Path) -> Iterator[Path]:
    runs = out.parent.parent
    in_study = runs.name == "runs" and (runs.parent / "study.yaml").is_file()
    folders = (arm / out.name for arm in runs.iterdir()) if in_study else out.parent.iterdir()
    for folder in islice(folders, MOST_LOOKED_AT):
        if folder != out and (folder / "results.json").is_file():
            yield folder


def _read_baseline(folder: Path, out: Path, wanted: dict[str, Any], ours: dict[str, Any]) -> BaselineRun | None:
    """Returns the run in a directory if it is the baseline that is wanted; None, too, if it cannot be read."""
    try:
        results = json.loads((folder / "results.json").read_text())
        provenance = results["provenance"]
        # Cheaper to know than the recipe, which has to be validated.
        if provenance["variants"]["source"] != "none":
            return None
        if provenance["dataset"]["digest"] != ours["provenance"]["dataset"]["digest"]:
            return None
        recipe = load(Recipe, folder / "recipe.yaml")
        if recipe.uses_variants() or baseline_of(recipe) != wanted:
            return None
        name = f"../{folder.name}" if folder.parent == out.parent else f"../../{folder.parent.name}/{folder.name}"
        return BaselineRun(folder, name, results, _read_lines(folder / "metrics.jsonl"))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Numbers in words ----
def _rows(metrics: dict[str, float], baseline: dict[str, float]) -> list[dict[str, str | bool]]:
    """Returns the metrics as the page shows them, with their units; what the baseline lacks is empty."""
    rows: list[dict[str, str | bool]] = []
    for name, value in metrics.items():
        if is_detail(name):
            continue
        row = {"metric": name, "value": shown(name, value), "spread": _spread(name, metrics)}
        if name in baseline:
            difference = difference_shown(name, value - baseline[name]).removesuffix(f" in {name}")
            row |= {"baseline": shown(name, baseline[name]), "difference": difference}
        rows.append({**row, "lower_is_better": unit_of(name).better == "lower"})
    return rows


def _spread(name: str, metrics: dict[str, float]) -> str:
    """Returns the interval and the deviation of a metric: "66.63 to 73.66 %, std 2.73 %"."""
    parts = []
    low, high, std = (metrics.get(f"{name}_{end}") for end in ("low", "high", "std"))
    if low is not None and high is not None:
        parts.append(f"{unit_of(name).number(low)} to {shown(name, high)}")
    if std is not None:
        parts.append(f"std {shown(name, std)}")
    return ", ".join(parts)


def _number(name: str, value: float | int) -> str:
    if name == "fresh_fraction":
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _protocol(facts: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """Returns the facts of a protocol in a line, and tables among them, which no line has room for."""
    line, tables = [], []
    for name, value in facts.items():
        words = name.replace("_", " ")
        if isinstance(value, dict):
            tables.append((words, "\n".join(f"{key}: {_plain(one)}" for key, one in value.items())))
        else:
            line.append(f"{words}: {_plain(value)}")
    return "; ".join(line), tables


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def draw_loss(epochs: list[dict[str, Any]], baseline: BaselineRun | None, theme: Theme) -> Figure:
    """Returns the curve of the loss, and that of the baseline."""
    figure, axes = new_figure(theme, 4.8, 2.4, font_size=10)
    curves = [("this run", epochs, "-", "o")]
    if baseline is not None:
        curves.append(("without variants", baseline.epochs, "--", "s"))
    for (label, rows, style, marker), colour in zip(curves, theme.colours, strict=False):
        axes.plot(
            [row["epoch"] for row in rows],
            [row["loss"] for row in rows],
            linestyle=style,
            color=colour,
            marker=marker if len(rows) <= 10 else None,
            markersize=4,
            label=label,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", color=theme.ink)
    axes.set_ylabel("loss (last step)", color=theme.ink)
    if baseline is not None:
        axes.legend(frameon=False, labelcolor=theme.ink)
    return figure


# ---- What the pages of a run and of a study share ----
def ledger_words(name: str) -> str:
    """Returns what a key of the ledger counts, in words."""
    if name.startswith("retries_"):
        return f"of these, because the server was {name.removeprefix('retries_')}"
    return LEDGER_WORDS.get(name, name.replace("_", " "))


def write_page(path: Path, package: str, helpers: dict[str, Callable[..., Any]], **content: Any) -> None:
    """Writes the page of `templates/report.html.j2` of a package, which extends `page.html.j2` here.

    The template and its macros may call the `helpers`; the `content` is what the page shows.
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
    """Returns a figure as a PNG, whose bytes do not name the version that drew it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def embed(png: bytes) -> str:
    """Returns a picture as the address that an `img` of the page has."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
