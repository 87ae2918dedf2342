"""Where variants enter: the views of a batch, made of sources and variants as the view plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from genssl.methods.base import Views
from genssl.variants.plan import StepPlan, view_columns
from genssl.variants.source import REAL, Delivery
from genssl.views.augmentations import Augmentations


@dataclass(frozen=True)
class Crops:
    """The sources of a step, cut out of images of whatever size as `Augmentations.crop_draws` says.

    Attributes:
        images: uint8 [B, 3, size, size] for every view, then for every small view of multi-crop.
    """

    images: tuple[torch.Tensor, ...]


def compose_views(
    plan: StepPlan,
    real: torch.Tensor | Crops,
    delivery: Delivery | None,
    augmentations: Augmentations,
    seed: int,
    device: torch.device,
) -> Views:
    """Makes the augmented views of a batch on `device`.

    A slot that the plan left real, or whose variant came too late (origin "real"), shows the source, augmented as real
    images are; that holds for the further views of policy `third` too. Augmentations depend on the run's seed, the
    epoch, the step, the view and the row's position in the global batch, and on nothing else.

    Args:
        real: uint8 [B, 3, S, S], the sources of the step, or crops of them.
        delivery: the variants that the plan requests, in its order, or None if there are none.

    Returns:
        Views float32 in [0, 1]: the pair and, under policy `third`, the further views [B, 3, size, size]; the small
            views of multi-crop, which show the source, or under `added` what the pair shows.
    """
    chosen = torch.from_numpy(plan.indices != REAL)
    assert delivery is not None or not chosen.any(), "the plan asks for variants and none were delivered"
    if delivery is not None:
        chosen[chosen.clone()] = torch.tensor([origin != "real" for origin in delivery.origins])
    views = view_columns(chosen.shape[1])
    cropped: Sequence[torch.Tensor | None] = [None] * len(views)
    small: tuple[torch.Tensor, ...] = ()
    if isinstance(real, Crops):
        own = [images.to(device).float().div_(255) for images in real.images]
        sources, cropped, small = torch.zeros_like(own[0]), own[: len(views)], tuple(own[len(views) :])
    else:
        sources = real.to(device).float().div_(255)
    columns = [sources] * chosen.shape[1]
    if delivery is not None and chosen.any():
        variants = _resized(torch.from_numpy(delivery.images).to(device).float() / 255, sources.shape[-1])
        number = (chosen.flatten().cumsum(0) - 1).view_as(chosen)  # of each slot's variant within the delivery
        for column, slots in enumerate(chosen.T):
            if slots.any():
                rows = slots.nonzero()[:, 0]
                columns[column] = sources.index_copy(0, rows.to(device), variants[number[rows, column].to(device)])
    first, second, *further = (
        augmentations.view(view, columns[column], chosen[:, column], plan, seed, cropped[view])
        for view, column in enumerate(views)
    )
    # An image that policy `added` adds to the data set is the image of its slot, in small views too.
    whole, shown = (columns[0], chosen[:, 0]) if len(columns) == 1 else (sources, torch.zeros(len(chosen)).bool())
    crops = augmentations.crops(whole, shown, plan, seed, small)
    return Views(pair=(first, second), generated=tuple(further), crops=crops)


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Returns images float [N, 3, s, s] in [0, 1] as [N, 3, size, size]."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
