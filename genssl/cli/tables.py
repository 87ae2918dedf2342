"""Tables for the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from genssl.base.wording import counted
from genssl.evaluators.units import is_detail, shown, unit_of
from genssl.studies.runs import RunGroup, mean_and_interval


def results_table(results: dict[str, Any]) -> Table:
    """Returns metrics and the most telling ledger entries of a run."""
    table = Table(title=results["name"], show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    for name, value in results["metrics"].items():
        table.add_row(name, shown(name, value))
    ledger = results["ledger"]
    if results["provenance"]["variants"]["source"] != "none":
        table.add_section()
        table.add_row("variants generated", f"{ledger['variants_generated']:,}")
        table.add_row("fresh", f"{ledger['fresh_fraction']:.1%}")
        for name, key in (
            ("from a store", "variants_from_store"),
            ("reused", "variants_reused"),
            ("real in place of variants", "fallbacks_to_real"),
        ):
            if ledger[key]:
                table.add_row(name, f"{ledger[key]:,}")
        table.add_row("waited for variants", f"{ledger['stall_seconds']:.1f} s")
    table.add_section()
    table.add_row("time in all", f"{results['seconds']:.0f} s")
    return table


def quality_table(quality: dict[str, Any], of: str = "") -> Table:
    """Returns what was measured of a generator, one row a setting; `of` begins the title."""
    from genssl.quality.measures import cell, columns

    title = f"{of}{quality['sources']} held-out sources ({quality['measured_on']})"
    title += "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in quality["fixed"].items())
    table = Table(title=title, title_justify="left")
    for heading in columns(quality):
        table.add_column(heading, justify="right")
    for row in quality["settings"]:
        table.add_row(*(cell(value) for value in row.values()))
    distance, judge = quality["distance_between_real_images"], quality["label_agreement_by"]
    table.caption = f"two random real images are {distance:.2f} apart; judged by {judge}"
    return table


def runs_table(groups: list[RunGroup]) -> Table:
    """Returns a row a group of runs; accuracies in per cent; mean ± half-width of the 95 % t-interval over seeds."""
    metrics = [
        name for name in dict.fromkeys(name for group in groups for name in group.metrics) if not is_detail(name)
    ]
    table = Table(title="mean ± 95 % interval over seeds; accuracies in %, differences in points", title_justify="left")
    for heading in ("recipe", "variants", "seeds"):  # the long names of metrics give way to them
        table.add_column(heading, min_width=min(len(heading), 8))
    for name in metrics:
        table.add_column(name, justify="right", overflow="fold", min_width=min(len(name), 8))
    table.add_column("seconds a run", justify="right")
    for group in groups:
        cells = [_mean(name, group.metrics.get(name, [])) for name in metrics]
        seconds = f"{sum(group.seconds) / len(group.seconds):.0f}"
        table.add_row(group.name, group.source, " ".join(map(str, group.seeds)), *cells, seconds)
    for group in groups:
        if group.baseline is not None:
            table.add_section()
            shared = [seed for seed in group.seeds if seed in group.baseline.seeds]
            cells = [_mean(name, group.differences(name), signed=True) for name in metrics]
            table.add_row("paired difference", f"{group.source} - none", " ".join(map(str, shared)), *cells, "")
    return table


def repeats(groups: list[RunGroup]) -> list[str]:
    """Returns a line for each recipe and seed with several runs, of which one counts."""
    return [
        f"{group.name} ({group.source}), seed {seed}: {used}, which finished last, counts; "
        f"{counted(len(others), 'repeat')} left out: {', '.join(map(str, others))}"
        for group in groups
        for seed, (used, others) in group.repeats.items()
    ]


def _mean(metric: str, values: list[float], *, signed: bool = False) -> str:
    """Returns "mean ± half-width", of an accuracy in per cent; the mean of a single value, nothing for none."""
    if not values:
        return ""
    unit, (mean, half) = unit_of(metric), mean_and_interval(values)
    text = unit.difference(mean) if signed else unit.number(mean)
    return text if math.isnan(half) else f"{text} ± {unit.number(half)}"
