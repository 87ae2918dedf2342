"""The global batch under DDP: gathering across ranks, outside the losses.

A loss is computed on the gathered batch by every rank alike. Its gradient with respect to a rank's own rows is summed
over the ranks; DDP then averages the gradients of the parameters over the ranks, and the two factors of the world
size cancel: the parameters get the gradient that one process would compute on the whole batch.

Without an initialised process group, everything here returns its argument.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Returns the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    # Not torch.distributed.nn.functional.all_gather: with gloo it returns wrong gradients when the incoming gradient is
    # not contiguous, as that of a transposed matrix product is.

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        # all_reduce and a slice rather than reduce_scatter, which gloo has only for some versions and dtypes. The clone
        # is contiguous and ours: the incoming gradient may be shared with other parts of the graph.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.count
        return total[start : start + ctx.count]


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Returns the rows of all ranks [W B, ...] in rank order; differentiable, the gradient summed over the ranks.

    Args:
        rows: [B, ...]; B is the same on every rank.
    """
    if world_size() == 1:
        return rows
    gathered: torch.Tensor = _Gather.apply(rows)
    return gathered


def gather_weights(weights: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the weights of all ranks' pairs, or None where there are none."""
    return None if weights is None else gather(weights.detach())


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Returns the mean of a tensor over the ranks; without a gradient."""
    values = values.detach()
    if world_size() == 1:
        return values
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / world_size()
