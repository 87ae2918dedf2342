"""The table of a study for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from genssl.studies.summary import Estimate, Summary


def study_table(summary: Summary) -> Table:
    """Returns a row an arm: the primary metric, its differences, and what it cost."""
    others = list(dict.fromkeys(name for arm in summary.arms for name in arm.differences))
    table = Table(
        title=f"{summary.title}: {summary.metric}, seeds {_seeds(summary.seeds)}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        caption_justify="left",
    )
    table.add_column("arm", no_wrap=True)
    for heading in ("%", *(f"- {name}" for name in others), "calls", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in summary.arms:
        differences = [arm.differences.get(name, {}).get(summary.metric) for name in others]
        table.add_row(
            arm.name if arm.matched is None else f"{arm.name} *",
            f"{100 * arm.metrics[summary.metric].mean:.2f}",
            *("" if difference is None else _shown(difference) for difference in differences),
            f"{arm.cost.generator_calls:,.0f}",
            f"{arm.cost.wall_clock_seconds:,.0f}",
        )
    table.caption = "differences in points ± 95 % interval, paired by seed; generator calls; wall-clock"
    if matched := sorted({arm.matched for arm in summary.arms if arm.matched is not None}):
        table.caption += f"\n* trained as long as {', '.join(matched)} took, not for equal steps"
    return table


def _shown(difference: Estimate) -> str:
    mean = f"{100 * difference.mean:+.2f}"
    return mean if difference.high is None else f"{mean}±{100 * (difference.high - difference.mean):.2f}"


def _seeds(seeds: list[int]) -> str:
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}..{seeds[-1]}"
    return ", ".join(map(str, seeds))
