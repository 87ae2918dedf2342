"""What a method is to the training loop, and what the methods share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from genssl.errors import ConfigError
from genssl.methods.configs import BatchStatistics, MethodConfig

ConfigT = TypeVar("ConfigT", bound=MethodConfig)


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


class MethodBase(nn.Module, Generic[ConfigT]):
    """What all methods here share: the backbone, its features, and a projector on top of them.

    A subclass sets `projector` (or a head of its own) and writes `step`; `Config` is its pydantic model.

    Args:
        config: of the method.
        backbone: maps float [B, 3, S, S] to float [B, feature_dim] and has the attribute `feature_dim`.
    """

    projector: nn.Module

    def __init__(self, config: ConfigT, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features float [B, feature_dim] of the trained backbone."""
        features: torch.Tensor = self.backbone(images)
        return features

    def after_step(self, done: float) -> None:
        """Does nothing: the method keeps neither a moving average nor a queue."""

    def project(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the projector's output for images."""
        projections: torch.Tensor = self.projector(self.backbone(images))
        return projections


def forward_views(
    network: Callable[[torch.Tensor], torch.Tensor], views: Sequence[torch.Tensor], statistics: BatchStatistics
) -> list[torch.Tensor]:
    """Returns the network's output for every view.

    Args:
        network: maps [B, ...] to [B, D].
        views: [B, ...] each, of equal shape.
        statistics: "per_view" forwards each view apart, as the official codes of SimSiam, BYOL, Barlow Twins, MoCo and
            VICReg do. "shared" sends all views through in one batch, as those of SimCLR and DINO do. It matters where
            one view is real and the other generated: apart, each kind is normalised by its own statistics, which hides
            from the loss how the kinds differ, and the running statistics that `encode` uses are a mean of the two;
            together, a normalised image depends on what the other view of its batch looks like.
    """
    if statistics == "per_view":
        return [network(view) for view in views]
    return list(network(torch.cat(list(views))).chunk(len(views)))


def whole_views(views: Views, method: str) -> tuple[torch.Tensor, ...]:
    """Returns the pair and the generated views.

    Raises:
        ConfigError: if there are multi-crop views, which would be ignored.
    """
    if views.crops:
        raise ConfigError(
            [f"method {method}: cannot use the small views of multi-crop; use method dino, or leave them out"]
        )
    return (*views.pair, *views.generated)


def pair_and_generated(
    compare: Callable[[int, int, torch.Tensor | None], torch.Tensor], views: Views, generated_weight: float
) -> StepOutput:
    """Returns the loss of the pair plus the weighted mean of the losses of the first view with each generated one.

    The first view is the real one under every view policy that adds generated views. `pair_weights` judge the pair
    alone.

    Args:
        compare: returns the loss between two views, by their places in `(*pair, *generated)`, with weights or None.
        views: of the batch.
        generated_weight: of the generated views together.
    """
    loss = compare(0, 1, views.pair_weights)
    if not views.generated:
        return StepOutput(loss=loss)
    extra = torch.stack([compare(0, 2 + place, None) for place in range(len(views.generated))]).mean()
    metrics = {"loss_pair": loss.item(), "loss_generated": extra.item()}
    return StepOutput(loss=loss + generated_weight * extra, metrics=metrics)
