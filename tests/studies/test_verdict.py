"""The words of a verdict follow from the interval alone."""

from __future__ import annotations

import pytest

from genssl.studies.summary import Estimate
from genssl.studies.verdict import judged


@pytest.mark.parametrize(
    ("mean", "low", "high", "ending"),
    [
        (0.02, 0.01, 0.03, ": higher."),
        (-0.02, -0.03, -0.01, ": lower."),
        (0.001, -0.004, 0.006, ": no difference is shown; one of up to 0.60 points either way is not excluded."),
        (-0.001, -0.006, 0.004, ": no difference is shown; one of up to 0.60 points either way is not excluded."),
        (0.0, 0.0, 0.0, ": equal."),
        (0.01, 0.0, 0.02, ": no difference is shown; one of up to 2.00 points either way is not excluded."),
    ],
)
def test_words_follow_from_the_interval(mean, low, high, ending):
    said = judged(Estimate(mean=mean, low=low, high=high, n=5))
    assert said.startswith(f"{100 * mean:+.2f} points (95 % interval {100 * low:+.2f} to {100 * high:+.2f}, 5 seeds")
    assert said.endswith(ending)


def test_one_seed_decides_nothing():
    assert judged(Estimate(mean=0.1, n=1)) == "+10.00 points at one seed, which says nothing about other seeds."
