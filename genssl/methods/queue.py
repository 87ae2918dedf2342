"""A first-in, first-out queue of embeddings, part of the state dict."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


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
