"""What the methods share: one forward for several views, and the loss of the pair and of the generated views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from genssl.errors import ConfigError
from genssl.methods.base import StepOutput, Views
from genssl.methods.configs import BatchStatistics


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
        compare: returns the loss between two views, by their places in (*pair, *generated), with weights or None.
        views: of the batch.
        generated_weight: of the generated views together.
    """
    loss = compare(0, 1, views.pair_weights)
    if not views.generated:
        return StepOutput(loss=loss)
    extra = torch.stack([compare(0, 2 + place, None) for place in range(len(views.generated))]).mean()
    metrics = {"loss_pair": loss.item(), "loss_generated": extra.item()}
    return StepOutput(loss=loss + generated_weight * extra, metrics=metrics)
