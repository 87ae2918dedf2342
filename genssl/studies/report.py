"""report.html of a study: one self-contained page, and its numbers and figures as CSV and PNG."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterable
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import Any

from ruamel.yaml import YAML

from genssl.base.files import write_atomically
from genssl.evaluators.units import unit_of
from genssl.studies import table
from genssl.studies.figures import drawings
from genssl.studies.model import ArmSummary, Control, RunCost, Summary
from genssl.studies.verdict import apart
from genssl.training.report import DARK, LIGHT, embed, ledger_words, png_of, write_page

COST_WORDS = {
    "generator_calls": "variants that the generator made",
    "generator_seconds": "time of the generator's device",
    "trainer_seconds": "training, waiting left out",
    "stall_seconds": "waiting for variants",
    "pregeneration_seconds": "making stored variants ahead",
    "wall_clock_seconds": "wall-clock: the three above",
    "distinct_variants": "distinct variants that the run saw",
    "views_from_variants": "views made of variants",
    "reused": "of these, stood in for another variant",
    "real_instead": "real images in place of variants",
    "store_bytes": "stored variants",
    "bytes_received": "received over the wire",
}


def write_report(out: Path, summary: Summary) -> None:
    """Writes report.html, summary.csv, runs.csv and figures/*.png into the study's folder."""
    table.write_summary_csv(out / "summary.csv", summary)
    table.write_runs_csv(out / "runs.csv", summary)
    provenance = {name: fact for name, fact in summary.provenance.items() if name != "run_anew"}
    write_page(
        out / "report.html",
        "genssl.studies",
        HELPERS,
        s=summary,
        numbers={arm.name: number for number, arm in enumerate(summary.arms, start=1)},
        steps_caption=_steps_caption(summary),
        dataset=_dataset(summary),
        figures=_figures(out / "figures", summary),
        samples=_samples(out, summary),
        costs=_costs(summary),
        ledger=_ledger(summary),
        provenance=[
            ("Versions, machine, data and generators", _yaml(provenance)),
            ("The base recipe, resolved", _yaml(summary.recipe)),
        ],
    )


def _passed(control: Control) -> bool:
    return control.max_abs_difference == 0 and control.encoders_equal


def _span(values: Iterable[int]) -> str:
    """Returns the one value, or the least and the largest."""
    found = sorted(values)
    if not found:
        return "none"
    return f"{found[0]:,}" if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"


def _steps_caption(summary: Summary) -> str:
    runs = [run for arm in summary.arms if arm.equal == "steps" for run in arm.runs]
    if not runs:
        return "No arms"
    steps, epochs = _span(run.steps for run in runs), _span(run.epochs for run in runs)
    unit = "epoch" if epochs == "1" else "epochs"
    return (
        f"Every run of these arms took {steps} optimiser steps ({epochs} {unit}). "
        f"Means over seeds with 95 % intervals; differences are of {summary.metric}"
    )


def _dataset(summary: Summary) -> str:
    dataset = summary.provenance.get("dataset") or summary.recipe.get("dataset") or {}
    name = dataset.get("name", "another data set") if isinstance(dataset, dict) else str(dataset)
    images = dataset.get("images") if isinstance(dataset, dict) else None
    return f"{name} ({images:,} training images)" if isinstance(images, int) else str(name)


# ---- Pictures ----
def _figures(folder: Path, summary: Summary) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for drawing in drawings(summary):
        light, dark = (png_of(drawing.draw(theme)) for theme in (LIGHT, DARK))
        write_atomically(folder / f"{drawing.name}.png", methodcaller("write_bytes", light))
        figures.append({"drawing": drawing, "light": embed(light), "dark": embed(dark), **_size(light)})
    return figures


def _samples(out: Path, summary: Summary) -> list[dict[str, Any]]:
    samples = []
    for arm in summary.arms:
        run = next(iter(arm.runs), None)
        if run is None or run.cost.views_from_variants == 0:
            continue
        path = out / run.directory / "samples.png"
        if path.is_file():
            png = path.read_bytes()
            samples.append({"arm": arm, "seed": run.seed, "png": embed(png), **_size(png)})
    return samples


def _size(png: bytes) -> dict[str, int]:
    width, height = struct.unpack(">II", png[16:24])  # of the header chunk, which comes first in every PNG
    return {"width": width, "height": height}


# ---- Tables of what was counted ----
def _costs(summary: Summary) -> list[tuple[str, list[str]]]:
    def text(name: str, value: float) -> str:
        if name.endswith("_seconds"):
            return table.seconds_text(value)
        return table.bytes_text(value) if "bytes" in name else table.count_text(value)

    return [
        (COST_WORDS.get(name, name), [text(name, getattr(arm.cost, name)) for arm in summary.arms])
        for name in RunCost.model_fields
    ]


def _ledger(summary: Summary) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for arm in summary.arms for run in arm.runs for name in run.ledger)
    if "views_generated" in names:
        names.pop("variants_generated", None)  # its old name
    return [(ledger_words(name), [_mean(arm, name) for arm in summary.arms]) for name in names]


def _mean(arm: ArmSummary, name: str) -> str:
    values = [run.ledger[name] for run in arm.runs if name in run.ledger]
    if not values:
        return ""
    if name == "fresh_fraction":  # in percent, as in a run's report
        return f"{100 * fmean(values):.1f} %"
    whole = all(value == round(value) for value in values)
    return table.count_text(fmean(values)) if whole else f"{fmean(values):,.3f}"


def _yaml(content: dict[str, Any]) -> str:
    yaml = YAML(typ="rt", pure=True)
    yaml.default_flow_style = False
    buffer = io.StringIO()
    yaml.dump(content, buffer)
    return re.sub(r"\n\.\.\.\n$", "\n", buffer.getvalue())


# What the template calls.
HELPERS: dict[str, Callable[..., Any]] = {
    "value": table.value_text,
    "difference": table.difference_text,
    "interval": table.interval_text,
    "verdict_of": table.verdict_of,
    "references": table.references,
    "count": table.count_text,
    "duration": table.seconds_text,
    "size": table.bytes_text,
    "unit": lambda metric: unit_of(metric).symbol,
    "points": lambda metric: unit_of(metric).points,
    "lower": lambda metric: unit_of(metric).better == "lower",
    "heading": lambda metric: "lower is better" if unit_of(metric).better == "lower" else unit_of(metric).symbol,
    "average": fmean,
    "apart": apart,
    "span": _span,
    "passed": _passed,
}
