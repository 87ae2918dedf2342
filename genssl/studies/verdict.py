"""What a study says in words, each sentence with its uncertainty, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence

from genssl.evaluators.units import difference_shown, unit_of
from genssl.studies.model import Control, Estimate, Summary

FEW_SEEDS = 5


def verdict(summary: Summary, headline: Sequence[str]) -> list[str]:
    """Returns sentences about the primary metric; the difference of the two arms of a `headline` comes first."""
    sentences, metric = [], summary.metric
    reference = summary.arm(summary.reference)
    if headline and {*headline} <= {arm.name for arm in summary.arms}:
        ours, theirs = (summary.arm(name) for name in headline)
        difference = ours.differences.get(theirs.name, {}).get(metric)
        if difference is not None:
            sentences.append(
                f"{ours.label} against {theirs.label}, at equal optimiser steps: {judged(difference, metric)}"
            )
    compared = [
        (arm, arm.differences[reference.name][metric])
        for arm in summary.arms
        if arm.equal == "steps" and reference.name in arm.differences and arm.control_of is None
    ]
    for arm, difference in compared:
        sentences.append(f"{arm.label} against {reference.label}: {judged(difference, metric)}")
    for arm in summary.arms:
        if arm.matched is not None and arm.matched in arm.differences:
            difference = arm.differences[arm.matched][metric]
            given = f"given the wall-clock of {summary.arm(arm.matched).label}, against it"
            sentences.append(f"{arm.label}, {given}: {judged(difference, metric)}")
    sentences += [_control(summary, name) for name in summary.controls]
    return sentences


def judged(difference: Estimate, metric: str = "top1") -> str:
    """Returns a paired difference in words: what it is, between what it lies, and what follows.

    The metric's unit says what is better; by default it is an accuracy.
    """
    unit, said = unit_of(metric), difference_shown(metric, difference.mean)
    if difference.low is None or difference.high is None:
        return f"{said} at one seed, which says nothing about other seeds."
    shown = (
        f"{said} (95 % interval {unit.difference(difference.low)} to {unit.difference(difference.high)}, "
        f"{difference.n} seeds, paired)"
    )
    if difference.low == difference.high == 0:
        return f"{shown}: equal."
    for found, word in ((difference.low > 0, "higher"), (difference.high < 0, "lower")):
        if found:
            # Of an accuracy everybody knows which way is better.
            worth = "better" if word == unit.better else "worse"
            return f"{shown}: {word}{'' if unit.better is None or unit.points else f', which is {worth}'}."
    most = max(-difference.low, difference.high)
    size = f"{unit.number(most)} {unit.points}".rstrip()
    return f"{shown}: no difference is shown; one of up to {size} either way is not excluded."


def _control(summary: Summary, name: str) -> str:
    control = summary.controls[name]
    arm, of = summary.arm(control.arm), summary.arm(control.of)
    if control.max_abs_difference == 0 and control.encoders_equal:
        return (
            f"Control: {arm.label} equals {of.label} exactly, in every metric and every weight at every seed. "
            "What differs elsewhere comes from the variants, not from the way they arrive."
        )
    why = ""
    if summary.provenance["machine"]["device"] != "cpu":
        why = " On a GPU, kernels that add in no fixed order can be the reason; on a CPU nothing excuses it."
    found = f"differs by up to {apart(control)}" if control.max_abs_difference else "has other weights"
    return (
        f"CONTROL FAILED: {arm.label} should equal {of.label} exactly and {found}; do not trust the other "
        f"comparisons.{why}"
    )


def apart(control: Control) -> str:
    """Returns how far the metrics of a control's arms are apart at most: "0.28 points in knn/top1"."""
    if not control.metric:  # there is no difference, or an earlier version wrote the summary
        return f"{control.max_abs_difference:.4g}"
    unit = unit_of(control.metric)
    return f"{unit.number(control.max_abs_difference)} {unit.points}".rstrip() + f" in {control.metric}"


def cautions(summary: Summary) -> list[str]:
    """Returns what a reader should hold against the verdict."""
    found = []
    if summary.quick:
        found.append("This is the short form: it shows that everything works, and its numbers mean little.")
    if len(summary.seeds) == 1:
        found.append("One seed gives no interval.")
    elif len(summary.seeds) < FEW_SEEDS:
        found.append(f"{len(summary.seeds)} seeds are few; the intervals are wide for that reason alone.")
    count = sum(len(arm.differences) for arm in summary.arms if arm.control_of is None)
    if count > 1 and len(summary.seeds) > 1:
        found.append(
            f"Each interval stands for itself; of {count} comparisons, about one in twenty would exclude zero by "
            "chance alone."
        )
    found.append(
        "Intervals are about the seed (first weights, order, augmentations, fresh variants). The test images are the "
        "same throughout, and stored variants are the same at every seed."
    )
    if any(arm.equal == "wall_clock" for arm in summary.arms):
        found.append(
            "Wall-clock is of this machine; start-up of generators and evaluation are left out on all sides. Arms with "
            "stored variants are charged with making them, as if no other run read them."
        )
    for arm in summary.arms:
        if late := arm.cost.real_instead:
            found.append(
                f"{arm.label}: {late / (arm.cost.views_from_variants + late):.1%} of the views that were to be "
                "variants were real images, because no variant of the image was there yet."
            )
    return found
