"""Robustness of a linear classifier on the representation to common corruptions of the test images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from genssl.base.devices import stream
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import RobustnessConfig
from genssl.evaluators.probes.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, corrupt
from genssl.evaluators.probes.linear_probe import fit_linear_probe

IMAGES = 256  # corrupted and encoded at a time


class Robustness(EvaluatorBase[RobustnessConfig]):
    """Fits the linear probe on clean train features, and tests it on clean and on corrupted test images.

    An image is corrupted 75 times: in 0.04 s on one core at 32 pixels, and in more than a second at 224.
    """

    Config = RobustnessConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if a class is too small to be split."""
        data.require_per_class(2, "evaluate.robustness")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("clean_top1", accuracy), "corrupted_top1", the mean over all, and "<family>_top1".

        Means are over the corruptions, each the mean of its five severities. The accuracy of every corruption and
        severity is in the protocol.
        """
        config = self._config
        probe = fit_linear_probe(encoder.features(data.train), config.penalties, config.held_out, config.seed)
        labelled = [row for row in range(len(data.test)) if data.test.label(row) >= 0]
        order = torch.randperm(len(labelled), generator=stream("robustness", config.seed)).tolist()
        rows = sorted(labelled[i] for i in order[: config.images])
        right = dict.fromkeys(CORRUPTIONS, np.zeros(len(SEVERITIES)))
        right_clean = 0
        for start in range(0, len(rows), IMAGES):
            part = rows[start : start + IMAGES]
            images = np.stack([data.test.image(row) for row in part])
            labels = np.array([data.test.label(row) for row in part])

            def count(shown: np.ndarray[Any, np.dtype[np.uint8]], expected: Any = labels) -> int:
                return int((probe.classifier.predict(encoder.encode(shown).numpy()) == expected).sum())

            right_clean += count(images)
            for name in CORRUPTIONS:
                right[name] = right[name] + [count(corrupt(images, name, s, config.seed)) for s in SEVERITIES]
        accuracies = {name: counts / len(rows) for name, counts in right.items()}
        self.protocol = {
            **probe.protocol,
            "corruptions": "of ImageNet-C's kinds, by genssl, scaled to the image; not comparable to published errors",
            "image_size": data.test.image_size,
            "accuracies": {name: [round(float(value), 6) for value in values] for name, values in accuracies.items()},
            "seed": config.seed,
            "tested_on": data.test_name,
            "tested": len(rows),
        }
        yield "clean_top1", right_clean / len(rows)
        yield "corrupted_top1", float(np.mean([values.mean() for values in accuracies.values()]))
        for family, names in FAMILIES.items():
            yield f"{family}_top1", float(np.mean([accuracies[name].mean() for name in names]))
