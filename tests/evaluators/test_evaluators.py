"""Evaluators on features whose answer is known, and on an encoder that must stay frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from genssl.data.base import raw_image
from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import FewShotConfig, KNNConfig, LinearProbeConfig
from genssl.evaluators.probes.few_shot import FewShot
from genssl.evaluators.probes.knn import KNN, knn_predict
from genssl.evaluators.probes.linear_probe import LinearProbe
from genssl.evaluators.run import evaluate


class Pixels(nn.Module):
    """Features are the pixels after a batch norm, whose statistics a careless evaluator would move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(192)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(images.flatten(1))


class Unlabelled:
    name, class_names, image_size, skipped = "bare", None, 8, ()


@pytest.fixture(scope="module")
def data(digits_train, digits_test) -> EvaluationData:
    return EvaluationData(digits_train, digits_test, "test")


def test_knn_equals_a_plain_loop():
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.randn((50, 5), generator=random), torch.randn((20, 5), generator=random)
    labels = torch.randint(0, 4, (50,), generator=random)
    expected = []
    for query in queries.double():
        similarity = (bank.double() @ query) / (bank.double().norm(dim=1) * query.norm())
        nearest = similarity.argsort(descending=True)[:7]
        votes = [
            float(sum(torch.exp(similarity[i] / 0.1) for i in nearest if labels[i] == label)) for label in range(4)
        ]
        expected.append(int(np.argmax(votes)))
    assert knn_predict(bank, labels, queries, k=7, temperature=0.1, num_classes=4).tolist() == expected


def test_knn_at_a_tiny_temperature_is_the_nearest_neighbour():
    bank, labels = torch.eye(3), torch.tensor([2, 0, 1])
    queries = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.1, 1.0]])
    assert knn_predict(bank, labels, queries, k=3, temperature=1e-6, num_classes=3).tolist() == [2, 1]


def test_evaluators_on_pixels_of_the_digits(data):
    encoder = FrozenEncoder(Pixels(), torch.device("cpu"))
    results = {}
    for evaluator in (
        KNN(KNNConfig()),
        LinearProbe(LinearProbeConfig(penalties=[0.01, 1.0])),
        FewShot(FewShotConfig(draws=5)),
    ):
        results.update(evaluator.run(encoder, data))
        assert evaluator.protocol["tested_on"] == "test"
        assert evaluator.protocol["tested"] == 360
    assert set(results) == {"top1", "top1@5", "top1@5_std", "top1@5_low", "top1@5_high"}
    assert results["top1@5_low"] < results["top1@5"] < results["top1@5_high"]
    assert 0.93 < results["top1"] < 1.0
    assert 0.6 < results["top1@5"] < 0.9
    assert 0 < results["top1@5_std"] < 0.1


def test_the_protocol_says_what_was_chosen_and_on_what(data):
    probe = LinearProbe(LinearProbeConfig(penalties=[1e-8, 1.0]))
    dict(probe.run(FrozenEncoder(Pixels(), torch.device("cpu")), data))
    assert probe.protocol["inverse_penalty"] == 1.0
    assert probe.protocol["chosen_on"].startswith("288 held-out train images")


def test_an_encoder_is_left_as_it_was(data):
    module = Pixels()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    metrics, protocols = evaluate([KNNConfig()], module, data, torch.device("cpu"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert set(metrics) == {"knn/top1"}
    assert protocols["knn"]["k"] == 20


def test_features_skip_unlabelled_images_and_are_computed_once():
    calls = []

    class Counting(nn.Module):
        def encode(self, images):
            calls.append(len(images))
            return images.flatten(1)

    class Mixed:
        class_names, image_size = ["a", "b"], 8

        def __len__(self) -> int:
            return 4

        def image(self, row):
            return np.full((3, 8, 8), row, np.uint8)

        def label(self, row):
            return [0, -1, 1, -1][row]

        def stored(self, row):
            return raw_image(self.image(row))

    encoder, dataset = FrozenEncoder(Counting(), torch.device("cpu")), Mixed()
    features = encoder.features(dataset)
    encoder.features(dataset)
    assert features.labels.tolist() == [0, 1]
    assert (features.features[:, 0] * 255).round().tolist() == [0, 2]
    assert calls == [2]


def test_missing_labels_are_one_clear_error(digits_test):
    with pytest.raises(DataError, match=r"need labels and bare has none here; set `evaluate: \[\]`"):
        KNN(KNNConfig()).check(EvaluationData(Unlabelled(), digits_test, "test"))


def test_too_few_labels_name_the_class(data):
    with pytest.raises(
        DataError, match=r"few_shot.labels_per_class: 2,000 images a class are needed, but class '\d' has"
    ):
        FewShot(FewShotConfig(labels_per_class=2000)).check(data)
    LinearProbe(LinearProbeConfig()).check(data)
    FewShot(FewShotConfig()).check(data)


def test_one_class_is_nothing_to_tell_apart(digits_test):
    class OneClass(Unlabelled):
        class_names = ("cat",)

        def __len__(self) -> int:
            return 3

        def label(self, row: int) -> int:
            return 0

    with pytest.raises(DataError, match=r"evaluate.linear_probe: bare has one class \(cat\)"):
        LinearProbe(LinearProbeConfig()).check(EvaluationData(OneClass(), digits_test, "test"))
