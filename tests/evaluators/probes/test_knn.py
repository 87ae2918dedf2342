"""kNN against a plain float64 loop, in any shape and with any chunks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from genssl.evaluators import base
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import KNNConfig
from genssl.evaluators.probes import knn
from genssl.evaluators.probes.knn import KNN, knn_predict, merge_nearest, nearest, vote


def by_loops(bank, labels, queries, k, temperature, classes) -> list[int]:
    """The vote of Wu et al. 2018, section 3.4, query by query."""
    bank, queries = np.asarray(bank, dtype=np.float64), np.asarray(queries, dtype=np.float64)
    predicted = []
    for query in queries:
        cosine = np.array([row @ query / (np.linalg.norm(row) * np.linalg.norm(query)) for row in bank])
        votes = np.zeros(classes)
        for row in np.argsort(-cosine)[:k]:
            votes[labels[row]] += np.exp(cosine[row] / temperature)
        predicted.append(int(votes.argmax()))
    return predicted


@pytest.mark.parametrize("chunks", [(1024, 65536), (7, 13), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("bank_rows", "dim", "k", "classes"),
    [(60, 5, 7, 4), (12, 40, 12, 3), (3, 100, 2, 2), (100, 1, 5, 2), (37, 8, 1, 20)],
)
def test_votes_equal_a_plain_loop(monkeypatch, chunks, bank_rows, dim, k, classes):
    monkeypatch.setattr(knn, "CHUNK", chunks[0])
    monkeypatch.setattr(knn, "BANK_CHUNK", chunks[1])
    random = torch.Generator().manual_seed(bank_rows)
    bank, queries = torch.randn((bank_rows, dim), generator=random), torch.randn((25, dim), generator=random)
    labels = torch.randint(0, classes, (bank_rows,), generator=random)
    if dim == 1:  # all cosines are 1 or -1 there, so which neighbours are taken is open; one label a sign is not
        labels = (bank[:, 0] > 0).long()
    found = knn_predict(bank, labels, queries, k=k, temperature=0.1, num_classes=classes)
    assert found.tolist() == by_loops(bank, labels, queries, k, 0.1, classes)


def test_neighbours_are_the_same_whatever_the_chunks(monkeypatch):
    random = torch.Generator().manual_seed(0)
    bank, queries = torch.randn((50, 6), generator=random), torch.randn((9, 6), generator=random)
    whole = nearest(bank, queries, 8)
    monkeypatch.setattr(knn, "BANK_CHUNK", 5)  # fewer than k a chunk
    parts = nearest(bank, queries, 8)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])
    assert (whole[0].diff(dim=1) <= 0).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_bank_in_shards_votes_as_a_whole_one(ranks):
    draws = torch.Generator().manual_seed(ranks)
    bank, queries = torch.randn(50, 8, generator=draws), torch.randn(33, 8, generator=draws)
    labels = torch.randint(0, 4, (50,), generator=draws)
    shards = []
    for rank in range(ranks):  # with 7 ranks a shard has fewer rows than k
        similarity, rows = nearest(bank[rank::ranks], queries, min(9, len(bank[rank::ranks])))
        shards.append((similarity, labels[rank::ranks][rows]))
    similarity, found = merge_nearest(shards, 9)
    whole, rows = nearest(bank, queries, 9)
    assert torch.allclose(similarity, whole)
    assert torch.equal(found, labels[rows])
    assert torch.equal(
        vote(similarity, found, temperature=0.1, num_classes=4),
        knn_predict(bank, labels, queries, k=9, temperature=0.1, num_classes=4),
    )


class Pixels(nn.Module):
    """Features that are the image."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


class Member:
    """One of several threads that exchange what they have, as ranks do."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(values)
        self._values, self._barrier = values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(timeout=30)
        return list(self._values)


def judged(data: EvaluationData, config: KNNConfig, sharing: Member | None = None) -> tuple[float, dict[str, Any]]:
    evaluator = KNN(config)
    ((_, accuracy),) = evaluator.run(FrozenEncoder(Pixels(), torch.device("cpu"), sharing), data)
    return accuracy, evaluator.protocol


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_that_share_the_bank_find_what_one_finds(digits_train, digits_test, ranks):
    data, config = EvaluationData(digits_train, digits_test, "test"), KNNConfig(k=7)
    values, barrier = [None] * ranks, threading.Barrier(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(lambda rank: judged(data, config, Member(rank, values, barrier)), range(ranks)))
    assert found == [judged(data, config)] * ranks
    assert found[0][1]["bank"] == len(digits_train)


def test_ranks_without_an_image_have_no_say(digits_train, digits_test):
    class Three:
        name, class_names, image_size, skipped = "three", digits_train.class_names, 8, ()
        image, label = staticmethod(digits_train.image), staticmethod(digits_train.label)

        def __len__(self) -> int:
            return 3

    data, config = EvaluationData(Three(), digits_test, "test"), KNNConfig()
    values, barrier = [None] * 4, threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rank: judged(data, config, Member(rank, values, barrier)), range(4)))
    assert found == [judged(data, config)] * 4
    assert (found[0][1]["k"], found[0][1]["bank"]) == (3, 3)


def test_a_bank_too_large_to_keep_is_encoded_in_parts(monkeypatch, digits_train, digits_test):
    data, config = EvaluationData(digits_train, digits_test, "test"), KNNConfig(k=150)
    whole = judged(data, config)
    encoded: list[int] = []
    encode_rows = FrozenEncoder.encode_rows

    def counted(self, dataset, rows):
        if dataset is digits_train:
            encoded.append(len(rows))
        return encode_rows(self, dataset, rows)

    monkeypatch.setattr(FrozenEncoder, "encode_rows", counted)
    assert judged(data, config) == whole
    assert encoded == [1, len(digits_train)], "one image tells how wide features are"
    encoded.clear()
    monkeypatch.setattr(base, "KEPT_BYTES", 4 * 192 * len(digits_train) - 1)
    monkeypatch.setattr(base, "PART", 100)  # fewer than k
    assert judged(data, config) == whole
    assert max(encoded) == 100
    assert sum(encoded) == 1 + len(digits_train)
