"""Plots of a study's metric against what it cost, one point an arm."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from genssl.evaluators.units import is_accuracy, scale
from genssl.studies.canvas import SMALL, Drawing, Key, colour, figure_with_key, halo, marker
from genssl.studies.model import ArmSummary, Estimate, Summary
from genssl.studies.table import seconds_text, value_text
from genssl.training.report import Theme


def scatter(
    summary: Summary, cost: str, what: str, text: Callable[[float], str], *, log: bool = False
) -> list[Drawing]:
    """Returns the plot of the metric against a cost, one point an arm, if any arm has a cost above 0."""
    metric, unit = summary.metric, "%" if is_accuracy(summary.metric) else ""
    points = [
        (number, arm, getattr(arm.cost, cost), arm.metrics[metric])
        for number, arm in enumerate(summary.arms)
        if metric in arm.metrics
    ]
    positive = [x for _, _, x, _ in points if x > 0]
    if not positive:
        return []
    values = [
        f"{arm.label}: {value_text(metric, e.mean)} {unit}".rstrip() + f" at {text(x)}" for _, arm, x, e in points
    ]
    log = log or max(positive) > 20 * min(positive)
    return [
        Drawing(
            re.sub(r"[^\w.-]", "-", f"{metric}-against-{what}"),
            f"{metric} against {what}",
            f"Mean over seeds with its 95 % interval{', on a logarithmic axis' if log else ''}. "
            "The numbers are those of the arms; a hollow marker is a single seed.",
            f"{metric} against {what}. {'; '.join(values)}.",
            partial(_draw_scatter, summary, points, what, log, text is seconds_text),
        )
    ]


def _draw_scatter(
    summary: Summary,
    points: Sequence[tuple[int, ArmSummary, float, Estimate]],
    what: str,
    log: bool,
    is_time: bool,
    theme: Theme,
) -> Figure:
    metric, factor = summary.metric, scale(summary.metric)
    divisor, unit = _time_unit(max(x for _, _, x, _ in points)) if is_time else (1.0, "")
    reference = next((estimate for _, arm, _, estimate in points if arm.name == summary.reference), None)
    key: Key = [(marker(theme, n, estimate), f"{n + 1}  {arm.label}") for n, arm, _, estimate in points]
    if reference is not None:
        mean_line = Line2D([], [], color=theme.soft, linewidth=1.2, linestyle=(0, (3, 2)))
        key.append((mean_line, f"mean of {summary.arm(summary.reference).label}"))
    title = f"{metric}, %" if is_accuracy(metric) else metric
    figure, axes = figure_with_key(theme, 3.1, key, below=what + unit, above=title)

    spots = [(x / divisor, factor * estimate.mean) for _, _, x, estimate in points]
    for (number, _, _, estimate), (x, y) in zip(points, spots, strict=True):
        if estimate.low is not None and estimate.high is not None:
            axes.plot([x, x], [factor * estimate.low, factor * estimate.high], color=colour(theme, number), zorder=3)
        axes.add_line(marker(theme, number, estimate, at=(x, y)))
    _value_axis(
        axes, [value * factor for *_, e in points for value in (e.mean, e.low, e.high) if value is not None], metric
    )
    _cost_axis(axes, [x for x, _ in spots], log=log)
    if reference is not None:
        axes.axhline(factor * reference.mean, color=theme.soft, linewidth=1.2, linestyle=(0, (3, 2)), zorder=1)

    figure.draw_without_rendering()  # so that it is known where the points are
    to_points = axes.transData + figure.dpi_scale_trans.inverted()
    places = [72 * to_points.transform(spot) for spot in spots]
    avoid = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    for (*_, estimate), (x, _), (across, _) in zip(points, spots, places, strict=True):
        if estimate.low is not None and estimate.high is not None:
            low, high = (72 * to_points.transform((x, factor * end))[1] for end in (estimate.low, estimate.high))
            avoid.append(Bbox([[across - 1, low], [across + 1, high]]))
    corners = axes.get_window_extent().get_points() * 72 / figure.dpi
    sizes = [(6.5 * len(str(number + 1)), 9.0) for number, *_ in points]
    centres = place_labels([tuple(place) for place in places], sizes, avoid, Bbox(corners))
    for (number, *_), spot, place, centre in zip(points, spots, places, centres, strict=True):
        offset = (centre[0] - place[0], centre[1] - place[1])
        axes.annotate(
            str(number + 1),
            spot,
            offset,
            textcoords="offset points",
            ha="center",
            va="center",
            size=SMALL,
            weight="bold",
            path_effects=halo(theme),
            arrowprops={"arrowstyle": "-", "color": theme.soft, "lw": 0.6} if math.hypot(*offset) > 15 else None,
            zorder=5,
            color=theme.ink,
        ).set_in_layout(False)
    return figure


def place_labels(
    anchors: Sequence[tuple[float, ...]], sizes: Sequence[tuple[float, float]], avoid: Sequence[Bbox], inside: Bbox
) -> list[tuple[float, float]]:
    """Chooses centres for labels near their points, such that they cover as little as possible.

    Args:
        anchors: where the points are, in points (1/72 inch).
        sizes: width and height of each label.
        avoid: what labels should not cover.
        inside: where they should stay.
    """
    directions = ((1, 0), (0.75, 0.75), (0.75, -0.75), (0, 1), (0, -1), (-1, 0), (-0.75, 0.75), (-0.75, -0.75))
    taken: list[Bbox] = []
    for (x, y), (width, height) in zip(anchors, sizes, strict=True):
        candidates: list[tuple[float, int, Bbox]] = []
        for radius in (10.0, 14.0, 19.0, 25.0, 32.0):
            for across, up in directions:
                left, bottom = x + across * (radius + width / 2 - 3) - width / 2, y + up * radius - height / 2
                box = Bbox.from_bounds(left, bottom, width, height)
                covered = sum(_overlap(box, one) for one in avoid) + 4 * sum(_overlap(box, one) for one in taken)
                outside = width * height - _overlap(box, inside)
                candidates.append((covered + 4 * outside + 0.6 * radius, len(candidates), box))
        taken.append(min(candidates)[2])
    return [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in taken]


def _overlap(one: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(one, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


def _value_axis(axes: Axes, ends: Sequence[float], metric: str) -> None:
    room = 0.08 * (max(ends) - min(ends)) or 1.0
    low, high = min(ends) - room, max(ends) + room
    if is_accuracy(metric):  # intervals of few seeds may leave what is possible
        low, high = max(low, -2), min(high, 102)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _cost_axis(axes: Axes, values: Sequence[float], *, log: bool) -> None:
    """Sets the horizontal axis; a logarithmic one has a place of its own for 0."""
    if not log:
        axes.set_xlim(min(0.0, *values), max(values) * 1.08)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    least, most = min(value for value in values if value > 0), max(values)
    span = max(math.log10(most / least), 0.5)  # decades
    # 0 is a quarter of the span below the least value.
    axes.set_xscale("symlog", linthresh=least, linscale=0.25 * span * 0.9)
    left = -0.35 * least if min(values) <= 0 else least / 10 ** (0.12 * span)
    axes.set_xlim(left, most * 10 ** (0.12 * span))
    steps = (1, 2, 5) if span < 1.2 else (1, 3) if span < 2.5 else (1,)
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    marks = [step * 10.0**decade for decade in decades for step in steps]
    shown = [mark for mark in marks if least <= mark <= most * 10 ** (0.12 * span)] or [least]
    axes.xaxis.set_major_locator(FixedLocator([0.0, *shown] if min(values) <= 0 else shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, ", s") if seconds < 300 else (60.0, ", min") if seconds < 18000 else (3600.0, ", h")
