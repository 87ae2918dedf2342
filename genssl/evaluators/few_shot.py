"""Classification from a few labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import FewShotConfig
from genssl.evaluators.linear_probe import linear_classifier


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
        """Yields ("top1@n", mean accuracy over the draws) and ("top1@n_std", their standard deviation)."""
        train, test = encoder.features(data.train), encoder.features(data.test)
        x, y = train.features.numpy(), train.labels.numpy()
        per_class = self._config.labels_per_class
        accuracies = []
        for draw in range(self._config.draws):
            random = np.random.default_rng((self._config.seed, draw))
            rows = np.concatenate(
                [
                    random.choice(np.flatnonzero(y == label), per_class, replace=False)
                    for label in range(data.num_classes)
                ]
            )
            classifier = linear_classifier(self._config.penalty).fit(x[rows], y[rows])
            accuracies.append(classifier.score(test.features.numpy(), test.labels.numpy()))
        self.protocol = {
            "classifier": "logistic regression on standardised features, L-BFGS",
            "inverse_penalty": self._config.penalty,
            "labels_per_class": per_class,
            "draws": self._config.draws,
            "seed": self._config.seed,
            "tested_on": data.test_name,
            "tested": len(test.labels),
        }
        yield f"top1@{per_class}", float(np.mean(accuracies))
        yield f"top1@{per_class}_std", float(np.std(accuracies, ddof=1))
