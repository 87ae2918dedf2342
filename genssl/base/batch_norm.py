"""Batch norm whose statistics are those of the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the ranks; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class CrossRankBatchNorm(_BatchNorm):
    """What `nn.SyncBatchNorm` is on CUDA, for the CPU, where torch has none. All ranks have batches of equal size."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalises [B, C, ...] by the statistics of all ranks' batches; in evaluation mode by the running ones."""
        if not self.training or dist.get_world_size() == 1:
            return super().forward(images)
        dtype = images.dtype
        # What autocast hands on in bfloat16 is normalised in float32, as nn.BatchNorm2d does it: sums over a batch need
        # the digits, and the running statistics are float32.
        images = images.to(torch.promote_types(dtype, torch.float32))
        dims = [0, *range(2, images.ndim)]
        shape = [1, -1, *[1] * (images.ndim - 2)]
        count = images.numel() // images.shape[1] * dist.get_world_size()
        # In two passes: the difference of two large means of squares would lose what one process keeps.
        mean: torch.Tensor = _Sum.apply(images.sum(dims)) / count
        centred = images - mean.view(shape)
        variance: torch.Tensor = _Sum.apply(centred.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(dtype)

    def _check_input_dim(self, images: torch.Tensor) -> None:
        assert images.ndim >= 2


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Returns the module with batch norms that see the global batch; names and values of its state stay."""
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.__class__ = CrossRankBatchNorm  # in place: others may hold a reference to the layer
    return module
