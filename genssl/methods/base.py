"""What a method is to the training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class StepOutput:
    """The loss to minimise (a scalar with a graph), and numbers worth logging."""

    loss: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Method(Protocol):
    """A self-supervised method; also an `nn.Module`."""

    feature_dim: int

    def step(self, views: Sequence[torch.Tensor]) -> StepOutput:
        """Computes the loss of a batch from its views, float [B, 3, S, S] each, row i of every view the same source."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the representation float [B, feature_dim] that evaluators judge."""
        ...

    def after_step(self) -> None:
        """Runs once after every optimiser step: moving averages, queues."""
        ...
