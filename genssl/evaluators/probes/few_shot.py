"""Classification from a few labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import FewShotConfig
from genssl.evaluators.probes.intervals import crossed_interval
from genssl.evaluators.probes.linear_probe import linear_classifier


class FewShot:
    """Draws n labelled train images a class, fits a linear classifier, tests it; repeated over many draws."""

    Config = FewShotConfig

    def __init__(self, config: FewShotConfig) -> None:
        self._config = config
        self.protocol: dict[str, Any] = {}

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
