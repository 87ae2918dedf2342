"""What a method is to the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True)
class Views:
    """What a method sees of a batch: float [B, 3, S, S] in [0, 1] each, row i of every view of the same source.

    Attributes:
        pair: the two views that every method compares.
        generated: further views of variants of the source, which `views.policy: third` adds.
        crops: further small views float [B, 3, s, s] of multi-crop.
        pair_weights: float [B] with mean 1; how much the loss of each pair counts. None: all the same. Under DDP the
            mean is 1 over the batches of all ranks together.
    """

    pair: tuple[torch.Tensor, torch.Tensor]
    generated: tuple[torch.Tensor, ...] = ()
    crops: tuple[torch.Tensor, ...] = ()
    pair_weights: torch.Tensor | None = None


@dataclass
class StepOutput:
    """The loss to minimise (a scalar with a graph), and numbers worth logging.

    Under DDP the mean of the loss over the ranks, and of its gradient, is the loss and gradient of the global batch.
    """

    loss: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Method(Protocol):
    """A self-supervised method; also an `nn.Module`.

    What a method remembers beyond its parameters (queues, centres, schedules) are buffers, so that its state dict is
    all there is to resume from. `step` changes none of them except the running statistics of batch norm; `after_step`
    changes the others.
    """

    feature_dim: int

    def step(self, views: Views) -> StepOutput:
        """Computes the loss of a batch from its views; once a micro-batch where gradients are accumulated."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the representation float [B, feature_dim] that evaluators judge."""
        ...

    def after_step(self, done: float) -> None:
        """Runs once after every optimiser step: moving averages, queues; `done` is the part of the training, 0..1."""
        ...
