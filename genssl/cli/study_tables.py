"""The table of a study for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from genssl.evaluators.units import Unit, unit_of
from genssl.studies.model import Estimate, Summary


def study_table(summary: Summary) -> Table:
    """Returns a row an arm: the primary metric, its differences, and what it cost."""
    unit = unit_of(summary.metric)
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
    for heading in (unit.symbol or "mean", *(f"- {name}" for name in others), "calls", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in summary.arms:
        differences = [arm.differences.get(name, {}).get(summary.metric) for name in others]
        table.add_row(
            arm.name if arm.matched is None else f"{arm.name} *",
            unit.number(arm.metrics[summary.metric].mean),
            *("" if difference is None else _shown(unit, difference) for difference in differences),
            f"{arm.cost.generator_calls:,.0f}",
            f"{arm.cost.wall_clock_seconds:,.0f}",
        )
    table.caption = f"differences{f' in {unit.points}' if unit.points else ''} ± 95 % interval, paired by seed"
    table.caption += f"{'; lower is better' if unit.better == 'lower' else ''}; generator calls; wall-clock"
    if matched := sorted({arm.matched for arm in summary.arms if arm.matched is not None}):
        table.caption += f"\n* trained as long as {', '.join(matched)} took, not for equal steps"
    return table


def _shown(unit: Unit, difference: Estimate) -> str:
    mean = unit.difference(difference.mean)
    return mean if difference.high is None else f"{mean}±{unit.number(difference.high - difference.mean)}"


def _seeds(seeds: list[int]) -> str:
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}..{seeds[-1]}"
    return ", ".join(map(str, seeds))
