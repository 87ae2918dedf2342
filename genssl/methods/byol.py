"""BYOL (Grill et al. 2020, arXiv 2006.07733).

Deviation from the official code: the momentum of an update counts the step it belongs to as done, so that the last
update has `momentum_end` exactly.

The target starts as a copy of the online network, projector included. Generated views: the same symmetric loss with the
first view; the target sees them too.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.methods.base import MethodBase, StepOutput, Views, forward_views, pair_and_generated, whole_views
from genssl.methods.configs import BYOLConfig
from genssl.methods.losses import byol
from genssl.methods.parts import cosine_momentum, follow, mlp, momentum_copy


class BYOL(MethodBase[BYOLConfig]):
    """An online network predicts the projections of a target network, which follows it by a moving average.

    Args:
        config: projector and predictor sizes, and the momentum.
        backbone: see `MethodBase`.
    """

    Config = BYOLConfig

    def __init__(self, config: BYOLConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        dim = config.projector_output_dim
        self.projector = mlp(self.feature_dim, config.projector_hidden_dim, dim, last_bias=False)
        self.predictor = mlp(dim, config.predictor_hidden_dim, dim, last_bias=False)
        self.target_backbone = momentum_copy(backbone)
        self.target_projector = momentum_copy(self.projector)

    def step(self, views: Views) -> StepOutput:
        """Returns the loss of equation 2 in both directions, of the pair and of the generated views."""
        seen, statistics = whole_views(views, "byol"), self.config.batch_statistics
        q = forward_views(lambda images: self.predictor(self.projector(self.backbone(images))), seen, statistics)
        with torch.no_grad():
            z = forward_views(lambda images: self.target_projector(self.target_backbone(images)), seen, statistics)

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            return byol(q[first], z[second], weights) + byol(q[second], z[first], weights)

        return pair_and_generated(compare, views, self.config.generated_weight)

    def after_step(self, done: float) -> None:
        """Moves the target network."""
        momentum = cosine_momentum(self.config.momentum_start, self.config.momentum_end, done)
        follow(self.target_backbone, self.backbone, momentum)
        follow(self.target_projector, self.projector, momentum)
