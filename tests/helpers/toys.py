"""Every method at a size for tests, on a backbone of two linear layers, and views drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from genssl.base.devices import seeded_initialisation, stream
from genssl.methods.base import Views
from genssl.registry import METHODS

SMALL: dict[str, dict[str, Any]] = {
    "simclr": {"projector_hidden_dim": 16, "projector_output_dim": 8},
    "simsiam": {"projector_hidden_dim": 16, "projector_output_dim": 16, "predictor_hidden_dim": 8},
    "byol": {"projector_hidden_dim": 16, "projector_output_dim": 8, "predictor_hidden_dim": 16},
    "barlow_twins": {"projector_hidden_dim": 16, "projector_output_dim": 8},
    "moco": {"projector_hidden_dim": 16, "projector_output_dim": 8, "queue_size": 20},
    "vicreg": {"projector_hidden_dim": 16, "projector_output_dim": 8},
    "nnclr": {"projector_hidden_dim": 16, "projector_output_dim": 8, "predictor_hidden_dim": 16, "queue_size": 20},
    "dino": {"projector_hidden_dim": 16, "bottleneck_dim": 8, "num_prototypes": 12, "freeze_prototypes": 0},
}


class TwoLayers(nn.Module):
    """A backbone without batch norm that takes images of every size."""

    feature_dim = 12

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * 4 * 4, 24), nn.GELU(), nn.Linear(24, self.feature_dim))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(F.adaptive_avg_pool2d(images, 4).flatten(1))
        return features


def make(name: str, backbone: Callable[[], nn.Module] = TwoLayers, *, seed: int = 0, **settings: Any) -> Any:
    """Returns a method with `SMALL` settings, its weights drawn from a seed as in a run."""
    config = METHODS.config(name)(name=name, **{**SMALL[name], **settings})
    with seeded_initialisation("model", seed):
        return METHODS.get(name)(config, backbone())


def without_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every batch norm by the identity: SyncBN, which makes ranks agree, does not run on a CPU."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)
    return module


def draw_views(
    n: int, seed: int = 0, *, generated: int = 0, crops: int = 0, weighted: bool = False, size: int = 8
) -> Views:
    """Returns views of n sources that are alike within a source and differ between sources; weights of mean 1."""
    generator = stream("views", seed)
    sources = torch.rand((n, 3, size, size), generator=generator)

    def view(side: int) -> torch.Tensor:
        noisy = sources + 0.2 * torch.randn(sources.shape, generator=generator)
        return noisy[:, :, :side, :side].clamp(0, 1)

    weights = torch.rand(n, generator=generator) + 0.1
    return Views(
        pair=(view(size), view(size)),
        generated=tuple(view(size) for _ in range(generated)),
        crops=tuple(view(size // 2) for _ in range(crops)),
        pair_weights=weights / weights.mean() if weighted else None,
    )


def part_of(views: Views, rows: slice, dtype: torch.dtype) -> Views:
    """Returns some of the sources' views, as the batch of one rank."""
    return replace(
        views,
        pair=tuple(view[rows].to(dtype) for view in views.pair),
        generated=tuple(view[rows].to(dtype) for view in views.generated),
        crops=tuple(view[rows].to(dtype) for view in views.crops),
        pair_weights=None if views.pair_weights is None else views.pair_weights[rows].to(dtype),
    )
