"""kNN against a plain float64 loop, in any shape and with any chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssl.evaluators import knn
from genssl.evaluators.knn import knn_predict, merge_nearest, nearest, vote


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
