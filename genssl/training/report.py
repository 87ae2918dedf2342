"""report.html: one self-contained page about a run, beside its baseline where there is one."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from genssl.base.files import write_atomically
from genssl.base.wording import counted
from genssl.config.recipe import Recipe
from genssl.evaluators.units import difference_shown, is_detail, shown, unit_of
from genssl.training.baseline import Baseline, find_baseline

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
# Ink, lines, this run and its baseline, on a light and on a dark page; the page's own colours.
THEMES = {
    "light": ("#1d2430", "#dde3ea", "#2563a8", "#b4500f"),
    "dark": ("#e6eaf0", "#39434f", "#7db4ec", "#f2a071"),
}


@dataclass(frozen=True)
class Row:
    """A metric as the page shows it.

    Attributes:
        metric: its name.
        value: with its unit.
        spread: its interval and standard deviation, if the evaluator gives them.
        baseline: value of the baseline; empty if there is none.
        difference: to that, with its unit.
        lower_is_better: said where it is so.
    """

    metric: str
    value: str
    spread: str
    baseline: str
    difference: str
    lower_is_better: bool


def write_report(out: Path, recipe: Recipe, results: dict[str, Any]) -> None:
    """Writes report.html from the run's results, metrics.jsonl and samples.png, and from its baseline's."""
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    baseline = find_baseline(out, recipe, results)
    environment = Environment(
        loader=PackageLoader("genssl.training"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    has_variants = results["provenance"]["variants"]["source"] != "none"
    counts = [
        (_words(name), _number(name, value), value)
        for name, value in results["ledger"].items()
        if name != "variants_generated"  # the old name of views_generated
        and (has_variants or name != "prefetch_depth")  # which is never 0, and nothing is asked for
    ]
    page = environment.get_template("report.html.j2").render(
        results=results,
        seed=recipe.seed,
        rows=_rows(results["metrics"], baseline.results["metrics"] if baseline else {}),
        protocols=[(name, *_protocol(facts)) for name, facts in results["protocol"].items()],
        baseline=baseline,
        ledger=[(words, text) for words, text, value in counts if value],
        nothing=[words for words, _, value in counts if not value],
        has_variants=has_variants,
        samples=_embed((out / "samples.png").read_bytes()),
        curves={theme: _embed(_loss_curve(epochs, baseline, theme)) for theme in THEMES},
        length=counted(len(epochs), "epoch"),
        images=_images(results["provenance"].get("dataset", {})),
        last=epochs[-1],
        provenance=json.dumps(results["provenance"], indent=2),
        recipe=json.dumps(recipe.model_dump(mode="json"), indent=2),
    )
    write_atomically(out / "report.html", lambda partial: partial.write_text(page, encoding="utf-8"))


def _rows(metrics: dict[str, float], theirs: dict[str, float]) -> list[Row]:
    return [
        Row(
            name,
            shown(name, value),
            _spread(name, metrics),
            shown(name, theirs[name]) if name in theirs else "",
            difference_shown(name, value - theirs[name]).removesuffix(f" in {name}") if name in theirs else "",
            unit_of(name).better == "lower",
        )
        for name, value in metrics.items()
        if not is_detail(name)
    ]


def _spread(name: str, metrics: dict[str, float]) -> str:
    """Returns what belongs to a metric: "66.63 to 73.66 %, std 2.73 %"."""
    said = []
    low, high, std = (metrics.get(f"{name}_{end}") for end in ("low", "high", "std"))
    if low is not None and high is not None:
        said.append(f"{unit_of(name).number(low)} to {shown(name, high)}")
    if std is not None:
        said.append(f"std {shown(name, std)}")
    return ", ".join(said)


def _images(dataset: dict[str, Any]) -> str:
    name = str(dataset.get("name", ""))
    return f"{name}, {counted(dataset['images'], 'training image')}" if "images" in dataset else name


def _words(name: str) -> str:
    if name not in LEDGER_WORDS and name.startswith("retries_"):
        return f"of these, because the server was {name.removeprefix('retries_')}"
    return LEDGER_WORDS[name]


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


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _loss_curve(epochs: list[dict[str, Any]], baseline: Baseline | None, theme: str) -> bytes:
    ink, line, *colours = THEMES[theme]
    figure = Figure(figsize=(4.8, 2.4), dpi=220, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    axis = figure.add_subplot(facecolor="none")
    curves = [("this run", epochs, "-", "o")]
    if baseline is not None:
        curves.append(("without variants", baseline.epochs, "--", "s"))
    for (label, rows, style, marker), colour in zip(curves, colours, strict=False):
        axis.plot(
            [row["epoch"] for row in rows],
            [row["loss"] for row in rows],
            linestyle=style,
            color=colour,
            marker=marker if len(rows) <= 10 else None,
            markersize=4,
            label=label,
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel("epoch", color=ink)
    axis.set_ylabel("loss (last step)", color=ink)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(ink)
    axis.tick_params(colors=ink)
    axis.grid(color=line, linewidth=0.7)
    if baseline is not None:
        axis.legend(frameon=False, labelcolor=ink)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
