"""Intervals for accuracies that are averaged over draws of the training labels and over test images."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95


def crossed_interval(correct: npt.NDArray[np.bool_], drawn_share: float) -> tuple[float, float]:
    """Returns a 95 % interval of the accuracy on new draws of labels and new test images.

    The mean over D draws and T images varies because of both, and both are crossed: every draw is tested on the same
    images. With the analysis of variance of a two-way layout without repetition (rows, columns, rest),

        Var = MS_rows / T * (1/D + r/(1-r)) + MS_columns / (D T) - MS_rest / (D T),

    where r is the part of the pool that a draw takes: two draws from one pool overlap, and to first order their
    accuracies have the correlation r (Hoeffding's projection), which no number of draws averages away. The interval is
    Student's on the scale of the logit, with Satterthwaite's degrees of freedom. Where no answer is wrong, or none is
    right, it is the exact binomial bound of T images.

    Args:
        correct: bool [D, T], draw by image, both at least 2.
        drawn_share: r, at least 0; at 1 all draws are the same and r / (1 - r) is left out.
    """
    draws, images = correct.shape
    mean = float(correct.mean())
    if mean in (0.0, 1.0):
        bound = ((1 - LEVEL) / 2) ** (1 / images)
        return (bound, 1.0) if mean == 1 else (0.0, 1 - bound)
    rows, columns = correct.mean(axis=1), correct.mean(axis=0)
    of_draws = float(rows.var(ddof=1))
    of_images = float(columns.var(ddof=1))
    rest = correct - rows[:, None] - columns + mean
    of_rest = float((rest**2).sum()) / ((draws - 1) * (images - 1))
    overlap = drawn_share / (1 - drawn_share) if drawn_share < 1 else 0.0
    by_draws, by_images = of_draws * (1 / draws + overlap), of_images / images
    # Both parts count the rest's share, so it is taken away once; never below the larger part.
    variance = max(by_draws + by_images - of_rest / (draws * images), by_draws, by_images)
    freedom = variance**2 / max(by_draws**2 / (draws - 1) + by_images**2 / (images - 1), 1e-300)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance) / (mean * (1 - mean))
    centre = math.log(mean / (1 - mean))
    return _expit(centre - reach), _expit(centre + reach)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
