"""Few-shot accuracies, and whether their intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm

from genssl.evaluators.base import EvaluationData, Features
from genssl.evaluators.configs import FewShotConfig
from genssl.evaluators.probes.few_shot import FewShot, crossed_interval
from genssl.evaluators.probes.linear_probe import linear_classifier

DIM, SHIFT, SHOTS = 5, 0.55, 5  # two classes, normal of deviation 1 around -SHIFT and +SHIFT in every dimension


class Drawn:
    """A split whose features are drawn; the encoder below hands them out."""

    name, class_names = "gaussians", ("a", "b")

    def __init__(self, random: np.random.Generator, per_class: int) -> None:
        labels = np.repeat([0, 1], per_class)
        features = random.standard_normal((2 * per_class, DIM)) + SHIFT * (2 * labels[:, None] - 1)
        self.drawn = Features(torch.from_numpy(features).float(), torch.from_numpy(labels))

    def __len__(self) -> int:
        return len(self.drawn.labels)

    def label(self, row: int) -> int:
        return int(self.drawn.labels[row])


class HandsOut:
    def features(self, dataset: Drawn) -> Features:
        return dataset.drawn


def true_accuracy(fits: int) -> float:
    """The accuracy, averaged over training sets, of the few-shot classifier on the two normals, in closed form."""
    random, accuracies = np.random.default_rng(99), []
    for _ in range(fits):
        train = Drawn(random, SHOTS).drawn
        fitted = linear_classifier(1.0).fit(train.features.numpy(), train.labels.numpy())
        scaler, regression = fitted[0], fitted[1]
        weights = regression.coef_[0] / scaler.scale_
        bias = regression.intercept_[0] - (weights * scaler.mean_).sum()
        signal, length = SHIFT * weights.sum(), np.linalg.norm(weights)
        accuracies.append((norm.cdf((signal + bias) / length) + norm.cdf((signal - bias) / length)) / 2)
    return float(np.mean(accuracies))


def coverage(repetitions: int, pool: int, tested: int, draws: int, truth: float) -> tuple[float, float]:
    """Returns how often the interval holds the truth, and its mean width."""
    held, widths = 0, []
    for repetition in range(repetitions):
        random = np.random.default_rng((7, pool, tested, repetition))
        data = EvaluationData(Drawn(random, pool), Drawn(random, tested), "test")
        few_shot = FewShot(FewShotConfig(labels_per_class=SHOTS, draws=draws, seed=repetition))
        found = dict(few_shot.run(HandsOut(), data))
        held += found["top1@5_low"] <= truth <= found["top1@5_high"]
        widths.append(found["top1@5_high"] - found["top1@5_low"])
    return held / repetitions, float(np.mean(widths))


def test_intervals_hold_the_true_accuracy_nearly_as_often_as_they_say():
    held, width = coverage(200, pool=60, tested=100, draws=6, truth=true_accuracy(600))
    assert 0.88 <= held <= 0.99
    assert width < 0.25


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "tested", "draws"), [(20, 100, 10), (200, 40, 5), (60, 400, 20)])
def test_intervals_hold_the_truth_at_many_sizes(pool, tested, draws):
    held, _ = coverage(300, pool, tested, draws, true_accuracy(2000))
    assert 0.91 <= held <= 0.985


def test_draws_that_are_all_the_same_leave_the_uncertainty_of_the_images_alone():
    one = np.random.default_rng(0).random(50) < 0.7
    low, high = crossed_interval(np.repeat(one[None], 8, axis=0), drawn_share=1.0)
    mean = one.mean()
    reach = norm.ppf(0.975) * np.sqrt(mean * (1 - mean) / 49) / (mean * (1 - mean))  # Student's t is a little wider
    logit = np.log([low / (1 - low), high / (1 - high)])
    assert np.mean(logit) == pytest.approx(np.log(mean / (1 - mean)))
    assert reach < (logit[1] - logit[0]) / 2 < 1.04 * reach


def test_the_variance_is_that_of_the_two_way_layout():
    """Against sums written out cell by cell; the width tells the variance, as many draws and images make t normal."""
    random = np.random.default_rng(1)
    skill, ease = random.normal(0, 0.5, (400, 1)), random.normal(0.8, 1.0, (1, 500))
    correct = random.random((400, 500)) < 1 / (1 + np.exp(-(skill + ease)))
    d, t = correct.shape
    mean = correct.sum() / (d * t)
    ms_rows = t * sum((row.sum() / t - mean) ** 2 for row in correct) / (d - 1)
    ms_columns = d * sum((column.sum() / d - mean) ** 2 for column in correct.T) / (t - 1)
    total = sum((float(value) - mean) ** 2 for value in correct.ravel())
    ms_rest = (total - ms_rows * (d - 1) - ms_columns * (t - 1)) / ((d - 1) * (t - 1))
    variance = (ms_rows + ms_columns - ms_rest) / (d * t)
    low, high = crossed_interval(correct, drawn_share=0.0)
    width = np.log(high / (1 - high)) - np.log(low / (1 - low))
    assert width == pytest.approx(2 * 1.965 * np.sqrt(variance) / (mean * (1 - mean)), rel=0.003)


def test_where_nothing_is_wrong_the_bound_is_the_exact_binomial_one():
    low, high = crossed_interval(np.ones((5, 100), dtype=bool), drawn_share=0.1)
    assert high == 1.0
    assert low**100 == pytest.approx(0.025)
    assert crossed_interval(np.zeros((5, 100), dtype=bool), drawn_share=0.1) == (0.0, pytest.approx(1 - low))
