"""Means over seeds, and differences paired by seed, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from genssl.studies.model import Estimate
from genssl.studies.runs import mean_and_interval

CONFIDENCE = 0.95


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean with its two-sided 95 % t-interval (n - 1 degrees of freedom); no interval for one value."""
    mean, half = mean_and_interval(list(values))
    if math.isnan(half):
        return Estimate(mean=mean, n=len(values))
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=len(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Returns the mean of ours - theirs over the seeds that both have, with the t-interval of these differences.

    Pairing by seed takes out what runs of one seed share: first weights, order of the images, augmentations.

    Args:
        ours, theirs: value by seed.

    Returns:
        None if no seed has both.
    """
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    return estimate(differences) if differences else None
