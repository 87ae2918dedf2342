"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230).

Deviations from the official code: none in the loss, whose statistics are over the global batch there too (SyncBN, and
an all-reduced cross-correlation). There the all-reduce has no gradient of its own, so that DDP's average is the whole
batch's gradient divided by the number of ranks; here it is that gradient.

Generated views: the same loss with the first view.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.base.gather import gather, gather_weights
from genssl.methods.base import MethodBase, StepOutput, Views, forward_views, pair_and_generated, whole_views
from genssl.methods.configs import BarlowTwinsConfig
from genssl.methods.losses import barlow_twins
from genssl.methods.parts import mlp


class BarlowTwins(MethodBase[BarlowTwinsConfig]):
    """A backbone and a three-layer projector; the two views' dimensions correlate one to one.

    Args:
        config: projector sizes, and the loss's weights.
        backbone: see `MethodBase`.
    """

    Config = BarlowTwinsConfig

    def __init__(self, config: BarlowTwinsConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        hidden = config.projector_hidden_dim
        self.projector = mlp(self.feature_dim, hidden, hidden, config.projector_output_dim, last_bias=False)

    def step(self, views: Views) -> StepOutput:
        """Returns the redundancy-reduction loss of the pair, and of the generated views."""
        outputs = forward_views(self.project, whole_views(views, "barlow_twins"), self.config.batch_statistics)
        z = [gather(output) for output in outputs]

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            loss = barlow_twins(z[first], z[second], self.config.off_diagonal_weight, gather_weights(weights))
            return self.config.loss_scale * loss

        return pair_and_generated(compare, views, self.config.generated_weight)
