"""Where variants enter: the two views of a batch, made of sources and variants as the view plan says."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from genssl.data.base import ImageDataset
from genssl.methods.base import Views
from genssl.runtime import stream
from genssl.variants.plan import REAL, VIEWS, StepPlan
from genssl.variants.source import Delivery, VariantRequest
from genssl.views.augment import Augment


def requests_of(plan: StepPlan, dataset: ImageDataset) -> list[VariantRequest]:
    """Returns the variants that a step wants, row by row, first view before second."""
    return [
        VariantRequest(row=int(row), source_id=dataset.source_id(int(row)), index=int(index))
        for row, indices in zip(plan.rows, plan.indices, strict=True)
        for index in indices
        if index != REAL
    ]


def compose_views(
    plan: StepPlan, real: torch.Tensor, delivery: Delivery | None, augment: Augment, seed: int, device: torch.device
) -> Views:
    """Makes the augmented views of a batch.

    Args:
        plan: of the step.
        real: uint8 [B, 3, S, S], the sources of the step.
        delivery: the variants that `requests_of(plan)` asked for, in its order, or None if it asked for none;
            a slot whose origin is "real" gets the source itself.
        augment: standard augmentations, applied to sources and variants alike.
        seed: of the run; augmentations depend on it, the epoch, the step and the view, and on nothing else.
        device: where the views are made.

    Returns:
        Views whose pair is float32 [B, 3, size, size] in [0, 1].
    """
    size = real.shape[-1]
    chosen = torch.from_numpy(plan.indices != REAL)
    views = real.to(device).float().div_(255).unsqueeze(1).repeat(1, VIEWS, 1, 1, 1)
    assert delivery is not None or not chosen.any(), "the plan asks for variants and none were delivered"
    if delivery is not None:
        chosen[chosen.clone()] = torch.tensor([origin != "real" for origin in delivery.origins])
    if delivery is not None and chosen.any():
        variants = torch.from_numpy(delivery.images).to(device).float() / 255
        if variants.shape[-1] != size:
            variants = F.interpolate(variants, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        views[chosen.to(device)] = variants
    first, second = (
        augment(views[:, view], stream("augment", seed, plan.epoch, plan.step, view)) for view in range(VIEWS)
    )
    return Views(pair=(first, second))
