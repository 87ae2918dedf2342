"""MoCo v2+ (He et al. 2020, arXiv 1911.05722; v2: Chen et al. 2020, arXiv 2003.04297).

MoCo with v2's MLP projector and a symmetric loss: solo-learn's `mocov2plus`, which the paper of generative augmentation
trains.

Deviations from the official code:
- Both views are queries and keys; one queue holds the keys of both, as in the authors' CIFAR demo (solo-learn: two).
- No shuffled batch norm. It hides which batch a key is from where each rank has statistics of its own; under DDP with
  SyncBN, as in solo-learn, or in one process there is nothing to shuffle between, and the key of a query shares its
  batch's statistics with it while the queue's do not. A rank's own statistics (DDP without SyncBN) would need it.
- The momentum may rise by half a cosine (0.99 to 0.999, solo-learn's setting; the papers' is 0.999 throughout).
- Keys enter the queue after the optimiser's step, whatever their number; the official code demands a divisor of the
  queue's size.

Generated views: the same symmetric loss with the first view; their keys do not enter the queue.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.base.gather import gather
from genssl.methods.base import MethodBase, StepOutput, Views, forward_views, pair_and_generated, whole_views
from genssl.methods.configs import MoCoConfig
from genssl.methods.losses import info_nce
from genssl.methods.parts import Queue, cosine_momentum, follow, mlp, momentum_copy


class MoCo(MethodBase[MoCoConfig]):
    """Queries find their key, made by a momentum encoder, among a queue of the keys of earlier batches.

    Args:
        config: projector sizes, temperature, queue size, and the momentum.
        backbone: see `MethodBase`.
    """

    Config = MoCoConfig

    def __init__(self, config: MoCoConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.projector = mlp(self.feature_dim, config.projector_hidden_dim, config.projector_output_dim, norm=False)
        self.key_backbone = momentum_copy(backbone)
        self.key_projector = momentum_copy(self.projector)
        self.queue = Queue(config.queue_size, config.projector_output_dim)
        self._new_keys: list[torch.Tensor] = []  # of the steps since the last `after_step`

    def step(self, views: Views) -> StepOutput:
        """Returns the symmetric InfoNCE loss of the pair, and of the generated views."""
        seen, statistics = whole_views(views, "moco"), self.config.batch_statistics
        q = forward_views(lambda images: self.projector(self.backbone(images)), seen, statistics)
        with torch.no_grad():
            k = forward_views(lambda images: self.key_projector(self.key_backbone(images)), seen, statistics)
        self._new_keys += [gather(k[0]), gather(k[1])]

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            queue, temperature = self.queue.keys, self.config.temperature
            there = info_nce(q[first], k[second], queue, temperature, weights)
            back = info_nce(q[second], k[first], queue, temperature, weights)
            return (there + back) / 2

        return pair_and_generated(compare, views, self.config.generated_weight)

    def after_step(self, done: float) -> None:
        """Moves the key encoder and puts the keys of the step into the queue, first views before second ones."""
        momentum = cosine_momentum(self.config.momentum_start, self.config.momentum_end, done)
        follow(self.key_backbone, self.backbone, momentum)
        follow(self.key_projector, self.projector, momentum)
        if self._new_keys:
            self.queue.push(torch.cat(self._new_keys))
            self._new_keys.clear()
