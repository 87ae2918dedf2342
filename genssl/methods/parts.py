"""What methods are put together from: projectors and predictors, momentum networks, queues of embeddings."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)


def mlp(
    *sizes: int,
    norm: bool = True,
    last_norm: Literal["none", "plain", "affine"] = "none",
    last_bias: bool = True,
) -> nn.Sequential:
    """Returns linear layers with batch norm and ReLU after each but the last.

    A linear layer before a batch norm has no bias: the norm would subtract it.

    Args:
        sizes: of the input, the hidden layers, and the output.
        norm: whether the hidden layers have batch norm.
        last_norm: batch norm after the last layer: none, without ("plain") or with ("affine") learnt scale and shift.
        last_bias: whether the last layer has a bias, if no norm follows it.
    """
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes[:-1]):
        layers.append(nn.Linear(size_in, size_out, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(size_out))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=last_bias and last_norm == "none"))
    if last_norm != "none":
        layers.append(nn.BatchNorm1d(sizes[-1], affine=last_norm == "affine"))
    return nn.Sequential(*layers)


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


class Queue(nn.Module):
    """The last `size` embeddings, of unit length; at first random ones, as in MoCo's code.

    Unlike MoCo's code the size need not be a multiple of the batch, and unlike lightly's memory bank nothing is
    dropped at the end: what overflows wraps around, and of a batch larger than the queue the last rows stay.

    Attributes:
        keys: float [size, dim].
        pointer: int64 scalar, the row that is overwritten next.
    """

    keys: torch.Tensor
    pointer: torch.Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: torch.Tensor) -> None:
        """Overwrites the oldest embeddings.

        Args:
            keys: float [N, dim] of any length, any N; normalised here. Under DDP the gathered ones, so that the queues
                of all ranks stay equal.
        """
        size, count = len(self.keys), len(keys)
        kept = keys[max(0, count - size) :]  # an index must not be written twice: which write wins is undefined
        # The pointer stays on its device: reading it on the host would wait for the GPU in every step.
        rows = (self.pointer + torch.arange(count - len(kept), count, device=keys.device)) % size
        self.keys.index_copy_(0, rows, F.normalize(kept.to(self.keys.dtype), dim=1))
        self.pointer.add_(count).remainder_(size)
