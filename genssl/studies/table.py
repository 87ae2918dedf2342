"""A study's numbers as text: on the page, and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from genssl.base.files import write_atomically
from genssl.evaluators.units import unit_of
from genssl.studies.model import ArmSummary, Estimate, RunCost, Summary

MINUS = "\N{MINUS SIGN}"
ONE_SEED = "no interval (one seed)"


# ---- Numbers in words ----
def value_text(metric: str, value: float) -> str:
    """Returns a value without its unit: per cent with two decimals, or four significant digits."""
    return _signed(unit_of(metric).number(value))


def difference_text(metric: str, value: float) -> str:
    """Returns a difference with its sign: points with two decimals, or four significant digits."""
    text = value_text(metric, value)
    return f"+{text}" if text.strip("0.,") and not text.startswith(MINUS) else text


def interval_text(metric: str, estimate: Estimate) -> str:
    """Returns the 95 % interval of an estimate with its n, as plus or minus where it is symmetric."""
    if estimate.low is None or estimate.high is None:
        return ONE_SEED if estimate.n == 1 else f"no interval, n = {estimate.n}"
    below, above = estimate.mean - estimate.low, estimate.high - estimate.mean
    if abs(above - below) <= 1e-6 * max(abs(above), abs(below), 1e-12):
        text = f"\N{PLUS-MINUS SIGN} {value_text(metric, above)}, n = {estimate.n}"
        return text.replace(" ", "\N{NO-BREAK SPACE}")
    low, high = value_text(metric, estimate.low), value_text(metric, estimate.high)
    return f"{low} to {high}, n = {estimate.n}"


def verdict_of(difference: Estimate) -> str:
    """Returns what the interval of a paired difference says: "above", "below", "equal", "open" or "unknown"."""
    if difference.low is None or difference.high is None:
        return "unknown"
    if difference.low == difference.high == 0:
        return "equal"
    return "above" if difference.low > 0 else "below" if difference.high < 0 else "open"


def count_text(value: float) -> str:
    """Returns a count, or a mean of counts, with thousands set apart."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:,.1f}"


def seconds_text(seconds: float) -> str:
    """Returns a duration in the unit that fits it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds == 0 or seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def bytes_text(size: float) -> str:
    """Returns a number of bytes with a decimal prefix."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def _signed(text: str) -> str:
    """Turns a hyphen into a minus sign, and drops the sign of a zero."""
    if not text.startswith("-"):
        return text
    return MINUS + text[1:] if text.strip("-0.,") else text[1:]


# ---- Who is compared ----
def references(summary: Summary, arms: Iterable[ArmSummary]) -> list[str]:
    """Returns all arms that any of `arms` is compared with, in the order of the study."""
    named = {name for arm in arms for name in arm.against}
    return [arm.name for arm in summary.arms if arm.name in named]


# ---- CSV ----
def write_summary_csv(path: Path, summary: Summary) -> None:
    """Writes one row per arm and metric: mean, interval, paired differences, and the arm's mean costs."""
    compared = references(summary, summary.arms)
    costs = list(RunCost.model_fields)
    header = ["arm", "label", "equal", "matched", "metric", "mean", "low", "high", "n"]
    for name in compared:
        header += [f"minus_{name}", f"minus_{name}_low", f"minus_{name}_high", f"minus_{name}_n"]
    rows = []
    for arm in summary.arms:
        for metric, estimate in arm.metrics.items():
            row: list[object] = [arm.name, arm.label, arm.equal, arm.matched, metric, *_cells(estimate)]
            for name in compared:
                row += _cells(arm.differences.get(name, {}).get(metric))
            rows.append(row + [getattr(arm.cost, cost) for cost in costs])
    _write(path, header + costs, rows)


def write_runs_csv(path: Path, summary: Summary) -> None:
    """Writes one row per run: its metrics, costs and ledger; what a run lacks is left empty."""
    runs = [(arm, run) for arm in summary.arms for run in arm.runs]
    metrics = list(dict.fromkeys(name for _, run in runs for name in run.metrics))
    ledger = list(dict.fromkeys(name for _, run in runs for name in run.ledger))
    costs = list(RunCost.model_fields)
    header = ["arm", "label", "seed", "directory", "epochs", "steps", "seconds", *metrics, *costs]
    rows: list[list[object]] = [
        [
            *(arm.name, arm.label, run.seed, run.directory, run.epochs, run.steps, run.seconds),
            *(run.metrics.get(name) for name in metrics),
            *(getattr(run.cost, name) for name in costs),
            *(run.ledger.get(name) for name in ledger),
        ]
        for arm, run in runs
    ]
    _write(path, header + [f"ledger_{name}" for name in ledger], rows)


def _cells(estimate: Estimate | None) -> list[object]:
    return [estimate.mean, estimate.low, estimate.high, estimate.n] if estimate else [None] * 4


def _write(path: Path, header: list[str], rows: list[list[object]]) -> None:
    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)

    write_atomically(path, write)
