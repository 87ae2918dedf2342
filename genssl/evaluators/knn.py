"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import KNNConfig

CHUNK = 1024


class KNN:
    """Cosine similarity, k neighbours, each votes exp(similarity / temperature) (Wu et al. 2018)."""

    Config = KNNConfig

    def __init__(self, config: KNNConfig) -> None:
        self._config = config
        self.protocol: dict[str, Any] = {}

    def check(self, data: EvaluationData) -> None:
        """Any labelled data will do."""

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("top1", accuracy)."""
        bank, test = encoder.features(data.train), encoder.features(data.test)
        k = min(self._config.k, len(bank.labels))
        predicted = knn_predict(
            bank.features,
            bank.labels,
            test.features,
            k=k,
            temperature=self._config.temperature,
            num_classes=data.num_classes,
        )
        self.protocol = {
            "similarity": "cosine",
            "k": k,
            "temperature": self._config.temperature,
            "bank": len(bank.labels),
            "tested_on": data.test_name,
            "tested": len(test.labels),
        }
        yield "top1", (predicted == test.labels).float().mean().item()


def knn_predict(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, *, k: int, temperature: float, num_classes: int
) -> torch.Tensor:
    """Classifies queries [M, D] by the weighted vote of their k nearest rows of bank [N, D] with labels int64 [N].

    Returns:
        int64 [M]. Memory is bounded by chunks of 1,024 queries.
    """
    bank = F.normalize(bank, dim=1)
    predictions = []
    queries = F.normalize(queries, dim=1)
    for start in range(0, len(queries), CHUNK):
        part = queries[start : start + CHUNK]
        similarity, neighbours = (part @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(part), num_classes, dtype=similarity.dtype)
        # exp of the difference to the best keeps the ranking and cannot overflow at small temperatures.
        votes.scatter_add_(1, labels[neighbours], ((similarity - similarity[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)
