"""Robustness: the classifier is fitted on clean features, and the means are of what was counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssl.data.load import Subset
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import LinearProbeConfig, RobustnessConfig
from genssl.evaluators.probes.corruptions import CORRUPTIONS, FAMILIES, corrupt
from genssl.evaluators.probes.linear_probe import LinearProbe, linear_classifier
from genssl.evaluators.probes.robustness import Robustness


class Pixels(torch.nn.Module):
    def encode(self, images):
        return images[:, 0].flatten(1)


@pytest.fixture(scope="module")
def data(digits_train, digits_test) -> EvaluationData:
    return EvaluationData(digits_train, digits_test, "test")


def test_clean_accuracy_is_the_linear_probes(data):
    encoder = FrozenEncoder(Pixels(), torch.device("cpu"))
    judge = Robustness(RobustnessConfig(penalties=[0.01, 0.1]))
    found = dict(judge.run(encoder, data))
    probe = dict(LinearProbe(LinearProbeConfig(penalties=[0.01, 0.1])).run(encoder, data))
    assert found["clean_top1"] == pytest.approx(probe["top1"])
    assert set(found) == {"clean_top1", "corrupted_top1", *(f"{family}_top1" for family in FAMILIES)}
    assert found["corrupted_top1"] < found["clean_top1"] - 0.02
    accuracies = judge.protocol["accuracies"]
    assert list(accuracies) == list(CORRUPTIONS)
    assert found["corrupted_top1"] == pytest.approx(np.mean(list(accuracies.values())), abs=1e-5)
    for family, names in FAMILIES.items():
        assert found[f"{family}_top1"] == pytest.approx(np.mean([accuracies[name] for name in names]), abs=1e-5)
    assert np.mean([values[0] for values in accuracies.values()]) > np.mean([v[4] for v in accuracies.values()]) + 0.1


def test_a_corruptions_accuracy_is_what_a_classifier_on_clean_pixels_gets(digits_train, digits_test):
    few = Subset(digits_test, np.arange(100))
    data = EvaluationData(digits_train, few, "test")
    judge = Robustness(RobustnessConfig(penalties=[0.1], seed=3))
    dict(judge.run(FrozenEncoder(Pixels(), torch.device("cpu")), data))

    def pixels(images):
        return np.stack(images)[:, 0].reshape(len(images), -1) / np.float32(255)

    def labels(dataset):
        return [dataset.label(row) for row in range(len(dataset))]

    classifier = linear_classifier(0.1).fit(
        pixels([digits_train.image(row) for row in range(len(digits_train))]), labels(digits_train)
    )
    images = np.stack([few.image(row) for row in range(len(few))])
    for name, severity in (("fog", 3), ("impulse_noise", 5)):
        expected = classifier.score(pixels(corrupt(images, name, severity, seed=3)), labels(few))
        assert judge.protocol["accuracies"][name][severity - 1] == pytest.approx(expected, abs=0.0101)


def test_fewer_images_are_drawn_by_the_seed(data):
    judge = Robustness(RobustnessConfig(images=20, penalties=[0.1]))
    first, again = (dict(judge.run(FrozenEncoder(Pixels(), torch.device("cpu")), data)) for _ in range(2))
    assert first == again
    assert judge.protocol["tested"] == 20
