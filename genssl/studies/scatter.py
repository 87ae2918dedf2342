"""Plots of a study's metric against what it cost, one point an arm."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from genssl.evaluators.units import is_accuracy, scale
from genssl.studies.model import ArmSummary, Estimate, Summary
from genssl.studies.sheet import Box, Drawing, Entry, Sheet, Theme, colour, draw_marker, marker, place
from genssl.studies.table import count_text, seconds_text, value_text


def scatters(summary: Summary) -> list[Drawing]:
    """Returns the plots for which any arm has a cost above 0."""
    return [
        *_scatter(summary, "distinct_variants", "distinct variants", count_text, log=True),
        *_scatter(summary, "wall_clock_seconds", "wall-clock", seconds_text),
        *_scatter(summary, "generator_seconds", "generator-seconds", seconds_text),
    ]


def _scatter(
    summary: Summary, cost: str, what: str, text: Callable[[float], str], *, log: bool = False
) -> list[Drawing]:
    metric = summary.metric
    points = [
        (number, arm, getattr(arm.cost, cost), arm.metrics[metric])
        for number, arm in enumerate(summary.arms)
        if metric in arm.metrics
    ]
    positive = [x for _, _, x, _ in points if x > 0]
    if not positive:
        return []
    read = "; ".join(
        f"{arm.label}: {value_text(metric, estimate.mean)}{_unit(metric)} at {text(x)}"
        for _, arm, x, estimate in points
    )
    log = log or max(positive) > 20 * min(positive)
    return [
        Drawing(
            re.sub(r"[^\w.-]", "-", f"{metric}-against-{what}"),
            f"{metric} against {what}",
            f"Mean over seeds with its 95 % interval{', on a logarithmic axis' if log else ''}. "
            "The numbers are those of the arms; a hollow marker is a single seed.",
            f"{metric} against {what}. {read}.",
            partial(_draw_scatter, summary, points, what, log, seconds=text is seconds_text),
        )
    ]


def _draw_scatter(
    summary: Summary,
    points: Sequence[tuple[int, ArmSummary, float, Estimate]],
    what: str,
    log: bool,
    theme: Theme,
    *,
    seconds: bool,
) -> Sheet:
    factor = scale(summary.metric)
    reference = next((estimate for _, arm, _, estimate in points if arm.name == summary.reference), None)
    key = [
        Entry(f"{number + 1}  {arm.label}", number, marker(number), hollow=estimate.n == 1)
        for number, arm, _, estimate in points
    ]
    if reference is not None:
        key.append(Entry(f"mean of {summary.arm(summary.reference).label}", dashed=True))
    sheet = Sheet(theme, 3.1, key)
    sheet.title(summary.metric + _unit(summary.metric, ", "))
    axes = sheet.axes(0.5, 0.5, 0.12, 0.28)
    largest = max(x for _, _, x, _ in points)
    divisor, unit = (1.0, "") if not seconds else _time_unit(largest)
    place_at = _x_axis(axes, [x / divisor for _, _, x, _ in points], log=log)
    sheet.below(what + unit)
    ends = [value * factor for *_, e in points for value in (e.mean, e.low, e.high) if value is not None]
    room = 0.08 * (max(ends) - min(ends)) or 1.0
    low, high = min(ends) - room, max(ends) + room
    if is_accuracy(summary.metric):  # intervals of few seeds may leave what is possible
        low, high = max(low, -2), min(high, 102)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if reference is not None:
        axes.axhline(factor * reference.mean, color=theme.soft, linewidth=1.2, linestyle=(0, (3, 2)), zorder=1)

    spots, avoid = [], []
    for number, _, x, estimate in points:
        at, y = place_at(x / divisor), factor * estimate.mean
        if estimate.low is not None and estimate.high is not None:
            low, high = factor * estimate.low, factor * estimate.high
            axes.plot([at, at], [low, high], color=colour(theme, number), linewidth=1.3, zorder=3)
            (left, bottom), (_, top) = _in_points(axes, at, low), _in_points(axes, at, high)
            avoid.append(Box(left - 1, bottom, left + 1, top))
        draw_marker(axes, theme, at, y, number, marker(number), hollow=estimate.n == 1)
        spot = _in_points(axes, at, y)
        spots.append(spot)
        avoid.append(Box(spot[0] - 4, spot[1] - 4, spot[0] + 4, spot[1] + 4))
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    inside = Box(*_in_points(axes, left, bottom), *_in_points(axes, right, top))
    sizes = [(6.5 * len(str(number + 1)), 9.0) for number, *_ in points]
    for (number, *_), spot, centre in zip(points, spots, place(spots, sizes, avoid, inside), strict=True):
        sheet.tag(str(number + 1), spot, centre)
    return sheet


def _x_axis(axes: Axes, values: Sequence[float], *, log: bool) -> Callable[[float], float]:
    """Sets the axis and returns where a value is on it; a logarithmic one has a place of its own for 0."""
    if not log:
        low, high = min(0.0, *values), max(values)
        axes.set_xlim(low, high * 1.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return lambda value: value
    logs = [math.log10(value) for value in values if value > 0]
    span = max(max(logs) - min(logs), 0.5)
    zero = min(logs) - 0.25 * span if min(values) <= 0 else None
    left = (zero if zero is not None else min(logs)) - 0.1 * span
    axes.set_xlim(left, max(logs) + 0.12 * span)
    steps = (1, 2, 5) if span < 1.2 else (1, 3) if span < 2.5 else (1,)
    marks = [
        step * 10.0**decade
        for decade in range(math.floor(min(logs)) - 1, math.ceil(max(logs)) + 1)
        for step in steps
        if min(logs) - 0.12 * span <= math.log10(step * 10.0**decade) <= max(logs) + 0.12 * span
    ]
    marks = marks or [value for value in values if value > 0][:1]
    places = [math.log10(mark) for mark in marks] + ([zero] if zero is not None else [])
    names = dict(zip(places, [*(_compact(mark) for mark in marks), "0"], strict=False))
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: names.get(at, "")))
    return lambda value: math.log10(value) if value > 0 else zero if zero is not None else left


def _compact(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _in_points(axes: Axes, x: float, y: float) -> tuple[float, float]:
    across, up = axes.transData.transform((x, y))
    dots = axes.figure.dpi / 72
    return across / dots, up / dots


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, ", s") if seconds < 300 else (60.0, ", min") if seconds < 18000 else (3600.0, ", h")


def _unit(metric: str, before: str = " ") -> str:
    return f"{before}%" if is_accuracy(metric) else ""
