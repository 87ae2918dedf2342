"""The figures of a study's report: what it gained against what it cost.

Arms go by their number in the study, since twenty labels fit in no plot; a key below says which is which. Shape,
hatching or number always tell apart what colour does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from genssl.evaluators.units import is_accuracy, scale
from genssl.studies.model import ArmSummary, Summary
from genssl.studies.scatter import scatters
from genssl.studies.sheet import (
    LINE,
    SMALL,
    Drawing,
    Entry,
    Sheet,
    Theme,
    colour,
    draw_marker,
    fill_style,
    halo,
    marker,
    named,
    write,
)
from genssl.studies.table import bytes_text, references, seconds_text

Amount = Callable[[ArmSummary], float]
BAR = 0.14  # inches


def drawings(summary: Summary) -> list[Drawing]:
    """Returns the figures that the study has content for."""
    return [
        *scatters(summary),
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
    arms = [
        (number, arm)
        for number, arm in enumerate(summary.arms)
        if any(amount(arm) > 0 for group in groups for *_, amount in group)
    ]
    if not arms:
        return []
    read = "; ".join(
        f"{arm.label}: " + ", ".join(f"{label} {text(amount(arm))}" for group in groups for label, *_, amount in group)
        for _, arm in arms
    )
    drawing = partial(_draw_bars, arms, groups, text)
    return [Drawing(name, title, caption, f"{title}. {read}.", drawing)]


def _draw_bars(
    arms: Sequence[tuple[int, ArmSummary]],
    groups: Sequence[Sequence[tuple[str, int, str, Amount]]],
    text: Callable[[float], str],
    theme: Theme,
) -> Sheet:
    key = [Entry(label, number, hatch=hatch) for group in groups for label, number, hatch, _ in group]
    totals = [[sum(amount(arm) for *_, amount in group) for group in groups] for _, arm in arms]
    heights = [LINE + BAR * sum(total > 0 for total in row) + 0.12 for row in totals]
    sheet, axes = _rows(theme, sum(heights), key)
    axes.set_axis_off()
    most = max(max(row) for row in totals)
    axes.set_xlim(0, most * 1.24)
    for at, (number, arm) in enumerate(arms):
        y = sum(heights[:at]) + LINE
        write(axes, 0, y - 0.05, named(number, arm.label), color=theme.ink, size=SMALL)
        for group, total in zip(groups, totals[at], strict=True):
            if total == 0:
                continue
            end = 0.0
            for _, series, hatch, amount in group:
                axes.barh(y + BAR / 2, amount(arm), BAR * 0.86, left=end, **fill_style(theme, series, hatch))
                end += amount(arm)
            style = {"va": "center_baseline", "color": theme.soft, "size": SMALL - 1}
            write(axes, end + most * 0.012, y + BAR / 2, text(end), **style)
            y += BAR
    return sheet


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


def _draw_forest(summary: Summary, arms: Sequence[tuple[int, ArmSummary, list[str]]], theme: Theme) -> Sheet:
    metric, factor = summary.metric, scale(summary.metric)
    compared = references(summary, [arm for _, arm, _ in arms])
    key = [Entry(f"against {summary.arm(name).label}", i, marker(i)) for i, name in enumerate(compared)]
    step = 0.16
    heights = [LINE + step * len(names) + 0.12 for *_, names in arms]
    sheet, axes = _rows(theme, sum(heights), key, below=0.45)
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_major_locator(NullLocator())
    axes.grid(visible=False, axis="y")
    ends = [0.0]
    style = {"transform": axes.get_yaxis_transform(), "color": theme.ink, "size": SMALL, "path_effects": halo(theme)}
    for at, (number, arm, names) in enumerate(arms):
        top = sum(heights[:at])
        if at:
            axes.axhline(top, color=theme.line, linewidth=0.7, zorder=1)
        write(axes, 0, top + LINE - 0.03, named(number, arm.label), zorder=3, **style)
        for i, name in enumerate(names):
            estimate, y = arm.differences[name][metric], top + LINE + step * (i + 0.5)
            series = compared.index(name)
            if estimate.low is not None and estimate.high is not None:
                interval = [factor * estimate.low, factor * estimate.high]
                axes.plot(interval, [y, y], color=colour(theme, series), linewidth=1.5, zorder=3)
                ends += interval
            ends.append(factor * estimate.mean)
            draw_marker(axes, theme, factor * estimate.mean, y, series, marker(series), hollow=estimate.n == 1)
    room = 0.06 * (max(ends) - min(ends)) or 1.0
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.axvline(0, color=theme.soft, linewidth=1.2, zorder=2)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    unit = "points" if is_accuracy(metric) else metric
    sheet.below(f"difference in {unit}")
    return sheet


def _rows(theme: Theme, height: float, key: Sequence[Entry], below: float = 0.05) -> tuple[Sheet, Axes]:
    """Returns a sheet whose vertical axis counts inches downwards from the first row."""
    sheet = Sheet(theme, height + below + 0.05, key)
    axes = sheet.axes(0.08, below, 0.08, 0.05)
    axes.set_ylim(height, 0)
    return sheet, axes
