"""What a study says in words, each sentence with its uncertainty, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence

from genssl.studies.summary import ArmSummary, Estimate, Summary

FEW_SEEDS = 5


def verdict(summary: Summary, headline: Sequence[str]) -> list[str]:
    """Returns sentences about the primary metric, the most important first.

    Args:
        summary: everything but its verdict.
        headline: two arms whose difference comes first; may be empty.
    """
    sentences = []
    reference = summary.arm(summary.reference)
    if headline and {*headline} <= {arm.name for arm in summary.arms}:
        ours, theirs = (summary.arm(name) for name in headline)
        difference = ours.differences.get(theirs.name, {}).get(summary.metric)
        if difference is not None:
            sentences.append(f"{ours.label} against {theirs.label}, at equal optimiser steps: {judged(difference)}")
    compared = [
        (arm, arm.differences[reference.name][summary.metric])
        for arm in summary.arms
        if arm.equal == "steps" and reference.name in arm.differences and arm.control_of is None
    ]
    for arm, difference in compared:
        sentences.append(f"{arm.label} against {reference.label}: {judged(difference)}")
    for arm in summary.arms:
        if arm.matched is not None and arm.matched in arm.differences:
            difference = arm.differences[arm.matched][summary.metric]
            given = f"given the wall-clock of {summary.arm(arm.matched).label}, against it"
            sentences.append(f"{arm.label}, {given}: {judged(difference)}")
    sentences += [_control(summary, name) for name in summary.controls]
    return sentences


def judged(difference: Estimate) -> str:
    """Returns a paired difference of accuracies in words: what it is, between what it lies, and what follows."""
    points = f"{100 * difference.mean:+.2f} points"
    if difference.low is None or difference.high is None:
        return f"{points} at one seed, which says nothing about other seeds."
    shown = (
        f"{points} (95 % interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f}, "
        f"{difference.n} seeds, paired)"
    )
    if difference.low > 0:
        return f"{shown}: higher."
    if difference.high < 0:
        return f"{shown}: lower."
    if difference.low == difference.high == 0:
        return f"{shown}: equal."
    most = 100 * max(-difference.low, difference.high)
    return f"{shown}: no difference is shown; one of up to {most:.2f} points either way is not excluded."


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
    return (
        f"CONTROL FAILED: {arm.label} should equal {of.label} exactly and differs by up to "
        f"{100 * control.max_abs_difference:.2f} points; do not trust the other comparisons.{why}"
    )


def cautions(summary: Summary) -> list[str]:
    """Returns what a reader should hold against the verdict."""
    found = []
    if summary.quick:
        found.append("This is the short form: it shows that everything works, and its accuracies mean little.")
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
    late = [arm for arm in summary.arms if arm.cost.real_instead > 0]
    found += [_real(arm) for arm in late]
    return found


def _real(arm: ArmSummary) -> str:
    wanted = arm.cost.views_from_variants + arm.cost.real_instead
    return (
        f"{arm.label}: {arm.cost.real_instead / wanted:.1%} of the views that were to be variants were real images, "
        "because no variant of the image was there yet."
    )
