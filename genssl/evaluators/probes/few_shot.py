"""Classification from a few labels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import stats

from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import FewShotConfig
from genssl.evaluators.probes.linear_probe import linear_classifier


class FewShot(EvaluatorBase[FewShotConfig]):
    """Draws n labelled train images a class, fits a linear classifier, tests it; repeated over many draws."""

    Config = FewShotConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if a class has too few images to draw from."""
        data.require_per_class(self._config.labels_per_class, "evaluate.few_shot.labels_per_class")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("top1@n", mean accuracy over the draws), "_std", their standard deviation, and "_low" and "_high".

        The last two are the 95 % interval for new draws of labels and new test images.
        """
        train, test = encoder.features(data.train), encoder.features(data.test)
        x, y = train.features.numpy(), train.labels.numpy()
        per_class = self._config.labels_per_class
        expected = test.labels.numpy()
        correct = np.zeros((self._config.draws, len(expected)), dtype=bool)
        for draw in range(self._config.draws):
            random = np.random.default_rng((self._config.seed, draw))
            rows = np.concatenate(
                [
                    random.choice(np.flatnonzero(y == label), per_class, replace=False)
                    for label in range(data.num_classes)
                ]
            )
            classifier = linear_classifier(self._config.penalty).fit(x[rows], y[rows])
            correct[draw] = classifier.predict(test.features.numpy()) == expected
        self.protocol = {
            "classifier": "logistic regression on standardised features, L-BFGS",
            "inverse_penalty": self._config.penalty,
            "labels_per_class": per_class,
            "draws": self._config.draws,
            "interval": "95 %, over draws of labels and over test images (crossed)",
            "seed": self._config.seed,
            "tested_on": data.test_name,
            "tested": len(test.labels),
        }
        accuracies = correct.mean(axis=1)
        smallest = int(np.bincount(y, minlength=data.num_classes).min())
        low, high = crossed_interval(correct, per_class / smallest)
        yield f"top1@{per_class}", float(accuracies.mean())
        yield f"top1@{per_class}_std", float(accuracies.std(ddof=1))
        yield f"top1@{per_class}_low", low
        yield f"top1@{per_class}_high", high


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
