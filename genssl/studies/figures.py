"""The figures of a study's report: what it gained against what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from genssl.evaluators.units import is_accuracy, scale
from genssl.studies.canvas import LINE, SMALL, Drawing, Key, colour, figure_with_key, halo, marker, named, write
from genssl.studies.model import ArmSummary, Summary
from genssl.studies.scatter import scatter
from genssl.studies.table import bytes_text, count_text, references, seconds_text
from genssl.training.report import Theme

Amount = Callable[[ArmSummary], float]
BAR, STEP = 0.14, 0.16  # inches: a bar, an interval


def drawings(summary: Summary) -> list[Drawing]:
    """Returns the figures that the study has content for."""
    return [
        *scatter(summary, "distinct_variants", "distinct variants", count_text, log=True),
        *scatter(summary, "wall_clock_seconds", "wall-clock", seconds_text),
        *scatter(summary, "generator_seconds", "generator-seconds", seconds_text),
        *_bars(
            summary,
            "cost",
            "What it cost",
            "Mean over seeds. Upper bar: wall-clock of a run. Lower bar: seconds of the generator's device, "
            "which may run beside the training.",
            [
                [
                    ("making stored variants ahead", 2, "///", lambda arm: arm.cost.pregeneration_seconds),
                    ("training", 0, "", lambda arm: arm.cost.trainer_seconds),
                    ("waiting for variants", 1, "xxx", lambda arm: arm.cost.stall_seconds),
                ],
                [("generator's device", 3, "...", lambda arm: arm.cost.generator_seconds)],
            ],
            seconds_text,
        ),
        *_bars(
            summary,
            "storage",
            "What it stored and sent",
            "Bytes of the stored variants of an arm, and bytes of variants received over the wire, mean over seeds.",
            [
                [("stored variants", 0, "", lambda arm: arm.cost.store_bytes)],
                [("received over the wire", 1, "///", lambda arm: arm.cost.bytes_received)],
            ],
            bytes_text,
        ),
        *_forest(summary),
    ]


# ---- Rows with a label above each ----
def _bars(
    summary: Summary,
    name: str,
    title: str,
    caption: str,
    groups: Sequence[Sequence[tuple[str, int, str, Amount]]],
    text: Callable[[float], str],
) -> list[Drawing]:
    series = [one for group in groups for one in group]
    arms = [
        (number, arm) for number, arm in enumerate(summary.arms) if any(amount(arm) > 0 for _, _, _, amount in series)
    ]
    if not arms:
        return []
    read = "; ".join(
        f"{arm.label}: " + ", ".join(f"{label} {text(amount(arm))}" for label, _, _, amount in series)
        for _, arm in arms
    )
    return [Drawing(name, title, caption, f"{title}. {read}.", partial(_draw_bars, arms, groups, text))]


def _draw_bars(
    arms: Sequence[tuple[int, ArmSummary]],
    groups: Sequence[Sequence[tuple[str, int, str, Amount]]],
    text: Callable[[float], str],
    theme: Theme,
) -> Figure:
    totals = [[sum(amount(arm) for *_, amount in group) for group in groups] for _, arm in arms]
    heights = [LINE + BAR * sum(total > 0 for total in row) + 0.12 for row in totals]
    fills: dict[str, dict[str, Any]] = {
        label: {"facecolor": colour(theme, number), "edgecolor": theme.paper, "hatch": hatch, "linewidth": 0}
        for group in groups
        for label, number, hatch, _ in group
    }
    figure, axes = figure_with_key(theme, sum(heights), [(Patch(**fill), label) for label, fill in fills.items()])
    axes.set_axis_off()
    most = max(map(max, totals))
    axes.set(xlim=(0, most * 1.24), ylim=(sum(heights), 0))
    for at, (number, arm) in enumerate(arms):
        y = sum(heights[:at]) + LINE
        write(axes, 0, y - 0.05, named(number, arm.label), color=theme.ink)
        for group, total in zip(groups, totals[at], strict=True):
            if total == 0:
                continue
            end = 0.0
            for label, _, _, amount in group:
                axes.barh(y + BAR / 2, amount(arm), BAR * 0.86, left=end, **fills[label])
                end += amount(arm)
            beside = {"va": "center_baseline", "color": theme.soft, "size": SMALL - 1}
            write(axes, end + most * 0.012, y + BAR / 2, text(end), **beside)
            y += BAR
    return figure


def _forest(summary: Summary) -> list[Drawing]:
    metric = summary.metric
    arms = [
        (number, arm, [name for name in references(summary, [arm]) if metric in arm.differences.get(name, {})])
        for number, arm in enumerate(summary.arms)
    ]
    arms = [(number, arm, names) for number, arm, names in arms if names]
    if not arms:
        return []
    return [
        Drawing(
            "paired-differences",
            "Paired differences",
            f"{metric} of an arm minus that of another at the same seed"
            f"{', in points' if is_accuracy(metric) else ''}: mean and 95 % interval. "
            "An interval that crosses the line at 0 leaves the sign open.",
            f"Paired differences of {metric}; the numbers are in the main table.",
            partial(_draw_forest, summary, arms),
        )
    ]


def _draw_forest(summary: Summary, arms: Sequence[tuple[int, ArmSummary, list[str]]], theme: Theme) -> Figure:
    metric, factor = summary.metric, scale(summary.metric)
    compared = references(summary, [arm for _, arm, _ in arms])
    key: Key = [(marker(theme, i), f"against {summary.arm(name).label}") for i, name in enumerate(compared)]
    heights = [LINE + STEP * len(names) + 0.12 for *_, names in arms]
    unit = "points" if is_accuracy(metric) else metric
    figure, axes = figure_with_key(theme, sum(heights) + 0.4, key, below=f"difference in {unit}")
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_major_locator(NullLocator())
    axes.set_ylim(sum(heights), 0)
    for at, (number, arm, names) in enumerate(arms):
        top = sum(heights[:at])
        if at:
            axes.axhline(top, color=theme.line, linewidth=0.7, zorder=1)
        style = {"transform": axes.get_yaxis_transform(), "color": theme.ink, "path_effects": halo(theme), "zorder": 5}
        write(axes, 0, top + LINE - 0.03, named(number, arm.label), **style)
        for i, name in enumerate(names):
            estimate, y, series = arm.differences[name][metric], top + LINE + STEP * (i + 0.5), compared.index(name)
            if estimate.low is not None and estimate.high is not None:
                axes.plot(
                    [factor * estimate.low, factor * estimate.high], [y, y], color=colour(theme, series), zorder=3
                )
            axes.add_line(marker(theme, series, estimate, at=(factor * estimate.mean, y)))
    axes.axvline(0, color=theme.soft, linewidth=1.2, zorder=2)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure
