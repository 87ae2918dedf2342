"""The table of a study for the terminal."""

from __future__ import annotations

from rich.table import Table

from genssl.studies.summary import Estimate, Summary


def study_table(summary: Summary) -> Table:
    """Returns a row an arm: the primary metric, its differences, and what it cost."""
    others = list(dict.fromkeys(name for arm in summary.arms for name in arm.differences))
    table = Table(title=f"{summary.title}: {summary.metric}, seeds {_seeds(summary.seeds)}", title_justify="left")
    table.add_column("arm")
    table.add_column("%", justify="right")
    for name in others:
        table.add_column(f"minus {summary.arm(name).label}, points", justify="right")
    table.add_column("generator calls", justify="right")
    table.add_column("wall-clock", justify="right")
    for arm in summary.arms:
        differences = [arm.differences.get(name, {}).get(summary.metric) for name in others]
        table.add_row(
            arm.label if arm.matched is None else f"{arm.label} (as long as {summary.arm(arm.matched).label})",
            _shown(arm.metrics[summary.metric]),
            *("" if difference is None else _shown(difference, signed=True) for difference in differences),
            f"{arm.cost.generator_calls:,.0f}",
            f"{arm.cost.wall_clock_seconds:,.1f} s",
        )
    return table


def _shown(estimate: Estimate, *, signed: bool = False) -> str:
    mean = f"{100 * estimate.mean:+.2f}" if signed else f"{100 * estimate.mean:.2f}"
    return mean if estimate.high is None else f"{mean} ± {100 * (estimate.high - estimate.mean):.2f}"


def _seeds(seeds: list[int]) -> str:
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}..{seeds[-1]}"
    return ", ".join(map(str, seeds))
