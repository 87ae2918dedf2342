"""The words of a verdict follow from the interval alone."""

from __future__ import annotations

import pytest

from genssl.studies.model import Control, Estimate
from genssl.studies.verdict import judged, verdict


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


@pytest.mark.parametrize(
    ("metric", "mean", "low", "high", "said"),
    [
        (
            "rankme/effective_rank",
            3.2,
            1.0,
            5.4,
            "+3.2 in rankme/effective_rank (95 % interval +1 to +5.4, 5 seeds, paired): higher.",
        ),
        (
            "frechet/distance",
            -3.2,
            -5.4,
            -1.0,
            "-3.2 in frechet/distance (95 % interval -5.4 to -1, 5 seeds, paired): lower, which is better.",
        ),
        (
            "frechet/distance",
            3.2,
            1.0,
            5.4,
            "+3.2 in frechet/distance (95 % interval +1 to +5.4, 5 seeds, paired): higher, which is worse.",
        ),
        (
            "prdc/density",
            0.02,
            0.01,
            0.03,
            "+0.02 in prdc/density (95 % interval +0.01 to +0.03, 5 seeds, paired): higher, which is better.",
        ),
        (
            "rankme/effective_rank",
            1.0,
            -1.0,
            3.0,
            "+1 in rankme/effective_rank (95 % interval -1 to +3, 5 seeds, paired): no difference is shown; one of up "
            "to 3 either way is not excluded.",
        ),
    ],
)
def test_a_metric_that_is_no_accuracy_has_its_own_unit(metric, mean, low, high, said):
    assert judged(Estimate(mean=mean, low=low, high=high, n=5), metric) == said


def test_a_control_that_fails_says_in_what(study):
    summary = study.model_copy(
        update={
            "controls": {
                "a_a": Control(
                    arm="again",
                    of="stored_10",
                    max_abs_difference=3.2,
                    metric="rankme/effective_rank",
                    encoders_equal=False,
                ),
                "a_a_2": Control(
                    arm="once", of="stored_1", max_abs_difference=0.0028, metric="knn/top1", encoders_equal=False
                ),
                "a_a_3": Control(arm="once", of="stored_1", max_abs_difference=0, encoders_equal=False),
            }
        }
    )
    *_, first, second, third = verdict(summary, [])
    assert "differs by up to 3.2 in rankme/effective_rank; do not trust" in first
    assert "differs by up to 0.28 points in knn/top1; do not trust" in second
    assert "exactly and has other weights; do not trust" in third


def test_one_seed_decides_nothing():
    assert judged(Estimate(mean=0.1, n=1)) == "+10.00 points at one seed, which says nothing about other seeds."
