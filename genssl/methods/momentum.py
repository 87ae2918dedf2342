"""Momentum networks: copies of a network that follow it by an exponential moving average."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)


def cosine_momentum(base: float, final: float, done: float) -> float:
    """Returns final - (final - base) (cos(pi done) + 1) / 2, which rises from `base` to `final` (BYOL, section 3.3).

    Args:
        base: at the start of the training, in [0, 1].
        final: at its end, in [0, 1].
        done: the part of the training that is finished, in [0, 1].
    """
    return final - (final - base) * (math.cos(math.pi * done) + 1) / 2


def momentum_copy(network: M) -> M:
    """Returns a copy with equal weights that no optimiser trains."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Moves the target: every parameter becomes momentum * target + (1 - momentum) * online.

    The running statistics of the target's batch norms stay its own. It runs in training mode, as in the codes of BYOL
    (its target_state), MoCo and DINO, so that it collects them from its own activations; those of the online network
    belong to other weights. All other buffers are copied.

    Args:
        target: what `momentum_copy` made.
        online: the network it was made of.
        momentum: in [0, 1]; 1 leaves the parameters alone.
    """
    for ours, theirs in zip(target.modules(), online.modules(), strict=True):
        for mine, other in zip(ours.parameters(recurse=False), theirs.parameters(recurse=False), strict=True):
            mine.lerp_(other, 1 - momentum)
        if not isinstance(ours, _BatchNorm):
            for kept, copied in zip(ours.buffers(recurse=False), theirs.buffers(recurse=False), strict=True):
                kept.copy_(copied)
