"""Variants and their source: cosine, retrieval and label agreement, against plain loops on pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from variants_of_digits import Pixels, noisy

from genssl.data.load import Subset
from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import SemanticConsistencyConfig
from genssl.evaluators.variants import consistency as module
from genssl.evaluators.variants.consistency import SemanticConsistency, retrieved


def consistency(made, train, test, encoder=None, **settings):
    evaluator = SemanticConsistency(SemanticConsistencyConfig(**settings))
    data = EvaluationData(train, test, "test", made)
    evaluator.check(data)
    frozen = FrozenEncoder(encoder or Pixels(), torch.device("cpu"))
    return dict(evaluator.run(frozen, data)), evaluator.protocol


def pixels(dataset, rows):
    return np.stack([dataset.image(row).ravel() / 255 for row in rows])


def cosine(x, y):
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_copies_are_wholly_consistent(digits_train, digits_test):
    found, protocol = consistency(noisy(0), digits_train, digits_test, images=100, variants=2)
    assert found["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["cosine_of_unrelated"] < 0.9
    assert found["retrieval@1"] == 1
    assert found["label_agreement"] == found["label_agreement_of_real"] > 0.9
    assert protocol["gallery"] == "the 100 sources"
    assert (protocol["voters"], protocol["k"], protocol["split"]) == (1437, 20, "test")


def test_they_equal_plain_loops(digits_train, digits_test):
    asked = []

    def remembering(split, rows, index):
        asked.append(list(rows))
        return noisy(90)(split, rows, index)

    found, _ = consistency(remembering, digits_train, digits_test, images=30, variants=2, k=3, temperature=0.1)
    rows = asked[0]
    sources, bank = pixels(digits_test, rows), pixels(digits_train, range(len(digits_train)))
    labels = [digits_train.label(row) for row in range(len(digits_train))]
    near, unrelated, first, agreed = [], [], [], []
    for index in range(2):
        variants = noisy(90)(digits_test, rows, index).reshape(30, -1) / 255
        for i, variant in enumerate(variants):
            similarities = [cosine(variant, source) for source in sources]
            near.append(similarities[i])
            unrelated.append(similarities[(i + 1) % 30])
            first.append(int(np.argmax(similarities)) == i)
            votes = np.zeros(10)
            to_bank = np.array([cosine(variant, one) for one in bank])
            for neighbour in np.argsort(-to_bank)[:3]:
                votes[labels[neighbour]] += np.exp(to_bank[neighbour] / 0.1)
            agreed.append(int(votes.argmax()) == digits_test.label(rows[i]))
    assert found["cosine"] == pytest.approx(np.mean(near), abs=1e-5)
    assert found["cosine_of_unrelated"] == pytest.approx(np.mean(unrelated), abs=1e-5)
    assert found["retrieval@1"] == pytest.approx(np.mean(first))
    assert found["label_agreement"] == pytest.approx(np.mean(agreed))
    assert 0 < found["label_agreement"] < found["label_agreement_of_real"]


def test_chunks_change_nothing(monkeypatch):
    random = torch.Generator().manual_seed(0)
    sources = torch.nn.functional.normalize(torch.randn((23, 4), generator=random), dim=1)
    variants = torch.nn.functional.normalize(sources + 0.3 * torch.randn((23, 4), generator=random), dim=1)
    whole = retrieved(sources, variants)
    assert 0 < whole.sum() < 23
    monkeypatch.setattr(module, "CHUNK", 5)
    assert torch.equal(retrieved(sources, variants), whole)


class Collapsed(nn.Module):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.ones((len(images), 4))


def test_an_encoder_that_tells_nothing_apart_retrieves_nothing(digits_train, digits_test):
    found, _ = consistency(noisy(0), digits_train, digits_test, encoder=Collapsed(), images=40)
    assert found["retrieval@1"] == 0
    assert found["cosine"] == pytest.approx(found["cosine_of_unrelated"])


def test_sources_of_the_train_split_do_not_vote(digits_train, digits_test):
    """Else a source's copy would be its own nearest neighbour, and agree whatever the encoder."""
    found, protocol = consistency(noisy(0), digits_train, digits_test, split="train", images=400, k=1)
    assert protocol["voters"] == 1437 - 400
    assert protocol["split"] == "train"
    assert found["label_agreement"] < 1
    with pytest.raises(DataError, match=r"images: all 1437 labelled images of the train split are sources"):
        consistency(noisy(0), digits_train, digits_test, split="train", images=2000)


def test_without_labels_the_rest_is_judged(digits_train, digits_test):
    class Unlabelled(Subset):
        def __init__(self, dataset) -> None:
            super().__init__(dataset, np.arange(len(dataset)))
            self.class_names = None

        def label(self, row: int) -> int:
            return -1

    found, _ = consistency(noisy(0), Unlabelled(digits_train), Unlabelled(digits_test), images=20)
    assert set(found) == {"cosine", "cosine_of_unrelated", "retrieval@1"}


def test_it_needs_variants_and_a_second_image(digits_train, digits_test):
    with pytest.raises(DataError, match=r"evaluate.semantic_consistency: this needs variants"):
        consistency(None, digits_train, digits_test)
    with pytest.raises(DataError, match=r"evaluate.semantic_consistency: 2 images are needed and the test split has 1"):
        consistency(noisy(0), digits_train, Subset(digits_test, np.arange(1)))
