"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import KNNConfig

CHUNK = 1024  # queries at a time
BANK_CHUNK = 65536  # rows of the bank at a time


class KNN(EvaluatorBase[KNNConfig]):
    """Cosine similarity, k neighbours, each votes exp(similarity / temperature) (Wu et al. 2018).

    Every rank of a run looks for neighbours in its share of train; memory does not grow with train.
    """

    Config = KNNConfig
    is_shared = True

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if there are no labels; any labelled data will do."""
        data.require_labels("evaluate.knn")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("top1", accuracy)."""
        test, bank = encoder.features(data.test), 0
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for part in encoder.shard(data.train):
            near, rows = nearest(part.features, test.features, min(self._config.k, len(part.labels)), encoder.device)
            found = [merge_nearest([*found, (near, part.labels[rows])], self._config.k)]
            bank += len(part.labels)
        shares = encoder.sharing.gather((bank, found))
        bank = sum(count for count, _ in shares)
        similarity, labels = merge_nearest([one for _, share in shares for one in share], self._config.k)
        predicted = vote(similarity, labels, temperature=self._config.temperature, num_classes=data.num_classes)
        self.protocol = {
            "similarity": "cosine",
            "k": similarity.shape[1],
            "temperature": self._config.temperature,
            "bank": bank,
            "tested_on": data.test_name,
            "tested": len(test.labels),
        }
        yield "top1", (predicted == test.labels).float().mean().item()


def knn_predict(
    bank: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Classifies queries [M, D] by the weighted vote of their k nearest rows of bank [N, D] with labels int64 [N].

    Args:
        bank, labels, queries: on the CPU.
        k: at most N.
        temperature: of the votes exp(similarity / temperature).
        num_classes: C.
        device: where similarities are computed; the CPU by default.

    Returns:
        int64 [M], on the CPU. Memory beside the features is bounded, by chunks of queries and of the bank.
    """
    similarity, rows = nearest(bank, queries, k, device)
    return vote(similarity, labels[rows], temperature=temperature, num_classes=num_classes)


def vote(similarity: torch.Tensor, labels: torch.Tensor, *, temperature: float, num_classes: int) -> torch.Tensor:
    """Returns the class int64 [M] with most votes exp(similarity / temperature) of neighbours [M, k], best first."""
    predictions = []
    for near, classes in zip(torch.split(similarity, CHUNK), torch.split(labels, CHUNK), strict=True):
        votes = torch.zeros(len(near), num_classes, dtype=near.dtype)
        # exp of the difference to the best keeps the ranking and cannot overflow at small temperatures.
        votes.scatter_add_(1, classes, ((near - near[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def merge_nearest(shards: Sequence[tuple[torch.Tensor, torch.Tensor]], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k nearest of all shards of a bank.

    Args:
        shards: similarities [M, at most k] of the nearest rows of a shard, and their labels int64 of the same shape.
        k: if all shards together have fewer columns, so many are returned.

    Returns:
        Similarities [M, k], best first, and labels int64 [M, k].
    """
    joined = torch.cat([near for near, _ in shards], dim=1)
    similarity, places = joined.topk(min(k, joined.shape[1]), dim=1)
    return similarity, torch.cat([labels for _, labels in shards], dim=1).gather(1, places)


def nearest(
    bank: torch.Tensor, queries: torch.Tensor, k: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k rows of bank [N, D] that queries [M, D] have the highest cosine similarity to.

    Returns:
        The similarities [M, k], best first, and the rows int64 [M, k], on the CPU.
    """
    device = device or bank.device
    best: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    # Chunks of the bank outside, so that a large one goes to the device once.
    for start in range(0, len(bank), BANK_CHUNK):
        part = F.normalize(bank[start : start + BANK_CHUNK].to(device), dim=1)
        for number, asked in enumerate(torch.split(queries, CHUNK)):
            similarity, found = (F.normalize(asked.to(device), dim=1) @ part.T).topk(min(k, len(part)), dim=1)
            similarity, found = similarity.cpu(), found.cpu() + start
            if start == 0:
                best.append(similarity)
                rows.append(found)
                continue
            joined, places = torch.cat([best[number], similarity], dim=1), torch.cat([rows[number], found], dim=1)
            best[number], kept = joined.topk(min(k, joined.shape[1]), dim=1)
            rows[number] = places.gather(1, kept)
    return torch.cat(best), torch.cat(rows)
