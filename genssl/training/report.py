"""report.html: one self-contained page about a run."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from genssl.config.recipe import Recipe
from genssl.evaluators.units import is_detail, shown
from genssl.training.files import write_atomically

LEDGER_WORDS = {
    "variants_generated": "views made of a variant that was generated for them",
    "variants_computed": "variants that the generator made for this run, used or not",
    "variants_from_store": "variants taken from a store",
    "variants_reused": "variants used again because the planned one was late",
    "fallbacks_to_real": "views that fell back to the real image",
    "distinct_variants": "distinct variants",
    "fresh_fraction": "part of the planned variants that arrived as planned",
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


def write_report(out: Path, recipe: Recipe, results: dict[str, Any]) -> None:
    """Writes report.html from the run's results, metrics.jsonl and samples.png."""
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    environment = Environment(
        loader=PackageLoader("genssl.training"), autoescape=select_autoescape(default=True, default_for_string=True)
    )
    page = environment.get_template("report.html.j2").render(
        results=results,
        shown=shown,
        is_detail=is_detail,
        recipe=json.dumps(recipe.model_dump(mode="json"), indent=2),
        ledger=[(_words(name), _number(value)) for name, value in results["ledger"].items()],
        metrics=[
            (name, value, _protocol(results["protocol"].get(name.split("/")[0], {})))
            for name, value in results["metrics"].items()
        ],
        has_variants=results["provenance"]["variants"]["source"] != "none",
        samples=_embed((out / "samples.png").read_bytes()),
        curve=_embed(_loss_curve(epochs)),
        epochs=len(epochs),
        last=epochs[-1],
        provenance=json.dumps(results["provenance"], indent=2),
    )
    write_atomically(out / "report.html", lambda partial: partial.write_text(page, encoding="utf-8"))


def _words(name: str) -> str:
    if name not in LEDGER_WORDS and name.startswith("retries_"):
        return f"of these, because the server was {name.removeprefix('retries_')}"
    return LEDGER_WORDS[name]


def _number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _protocol(facts: dict[str, Any]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _loss_curve(epochs: list[dict[str, Any]]) -> bytes:
    figure = Figure(figsize=(7, 2.6), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.plot(
        [row["epoch"] for row in epochs],
        [row["loss"] for row in epochs],
        color="#2563a8",
        marker="o" if len(epochs) < 3 else None,
    )
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss (last step)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
