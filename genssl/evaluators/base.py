"""What evaluators have in common: frozen features, computed once, and the form of their results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from genssl.data.base import ImageDataset
from genssl.errors import DataError

BATCH = 512


@dataclass
class Features:
    """Representations float32 [N, D] of the labelled images of a split, and their labels int64 [N], on the CPU."""

    features: torch.Tensor
    labels: torch.Tensor


class EvaluationData:
    """The train and test split that evaluators judge on.

    Args:
        train: where neighbours and probes come from.
        test: what is classified.
        test_name: what the test split is, such as "test" or "validation (a fifth of train)"; part of every protocol.

    Raises:
        DataError: if the data set has no labels.
    """

    def __init__(self, train: ImageDataset, test: ImageDataset, test_name: str) -> None:
        if train.class_names is None:
            raise DataError(
                f"evaluate: the evaluators need labels and {train.name} has none here; "
                "set `evaluate: []`, or give labels"
            )
        self.train, self.test, self.test_name = train, test, test_name
        self.num_classes = len(train.class_names)

    def require_per_class(self, count: int, setting: str) -> None:
        """Raises DataError, naming `setting`, unless train has this many images of every class, and two classes."""
        names = self.train.class_names
        assert names is not None
        labels = np.array([self.train.label(row) for row in range(len(self.train))])
        counts = np.bincount(labels[labels >= 0], minlength=self.num_classes)
        if self.num_classes < 2:
            raise DataError(f"{setting}: {self.train.name} has one class ({names[0]}); two are needed to tell apart")
        if counts.min() < count:
            raise DataError(
                f"{setting}: {count} images a class are needed, but class {names[int(counts.argmin())]!r} has "
                f"{counts.min()} for training"
            )


class FrozenEncoder:
    """An encoder whose weights and statistics evaluators cannot change; features of a split are computed once.

    Args:
        module: anything with `encode(float [B, 3, S, S] in [0, 1]) -> [B, D]`.
        device: where it runs.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module.eval().requires_grad_(False), device
        self._cache: dict[int, Features] = {}

    @torch.inference_mode()
    def features(self, dataset: ImageDataset) -> Features:
        """Encodes every labelled image of a split, without augmentation."""
        if id(dataset) not in self._cache:
            rows = [row for row in range(len(dataset)) if dataset.label(row) >= 0]
            parts = []
            for start in range(0, len(rows), BATCH):
                images = np.stack([dataset.image(row) for row in rows[start : start + BATCH]])
                batch = torch.from_numpy(images).to(self._device).float() / 255
                parts.append(self._module.encode(batch).float().cpu())  # type: ignore[operator]
            labels = torch.tensor([dataset.label(row) for row in rows])
            self._cache[id(dataset)] = Features(torch.cat(parts).clone(), labels)
        return self._cache[id(dataset)]


class Evaluator(Protocol):
    """Judges a frozen encoder. Made from its Config."""

    protocol: dict[str, Any]
    """Every fact that the numbers depend on; written into results.json."""

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if it cannot judge on this data; called before the training."""
        ...

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterable[tuple[str, float]]:
        """Yields (name, value), accuracies in 0..1."""
        ...
