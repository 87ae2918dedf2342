"""Linear classification of frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import LinearProbeConfig


def linear_classifier(penalty: float) -> Pipeline:
    """Returns standardisation followed by multinomial logistic regression (L-BFGS) with inverse penalty `penalty`."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))


class LinearProbe:
    """The penalty is chosen on a held-out part of train, then the probe is fitted on all of it; test is used once."""

    Config = LinearProbeConfig

    def __init__(self, config: LinearProbeConfig) -> None:
        self._config = config
        self.protocol: dict[str, Any] = {}

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if a class is too small to be split."""
        data.require_per_class(2, "evaluate.linear_probe")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("top1", accuracy)."""
        train, test = encoder.features(data.train), encoder.features(data.test)
        x, y = train.features.numpy(), train.labels.numpy()
        rows = np.arange(len(y))
        fit, held_out = train_test_split(
            rows, test_size=self._config.held_out, random_state=self._config.seed, stratify=y
        )
        scores = {
            penalty: linear_classifier(penalty).fit(x[fit], y[fit]).score(x[held_out], y[held_out])
            for penalty in self._config.penalties
        }
        chosen = max(scores, key=lambda penalty: (scores[penalty], -penalty))
        probe = linear_classifier(chosen).fit(x, y)
        self.protocol = {
            "classifier": "logistic regression on standardised features, L-BFGS",
            "inverse_penalty": chosen,
            "chosen_among": self._config.penalties,
            "chosen_on": f"{len(held_out)} held-out train images, seed {self._config.seed}",
            "trained_on": len(y),
            "tested_on": data.test_name,
            "tested": len(test.labels),
        }
        yield "top1", float(probe.score(test.features.numpy(), test.labels.numpy()))
