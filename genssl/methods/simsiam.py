"""SimSiam (Chen and He 2021, arXiv 2011.10566).

Deviation from the official code: its script keeps the predictor's learning rate constant (--fix-pred-lr); here all
parameters follow the recipe's schedule.

Generated views: the same symmetric loss with the first view.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.methods.base import StepOutput, Views
from genssl.methods.configs import SimSiamConfig
from genssl.methods.heads import mlp
from genssl.methods.losses import negative_cosine
from genssl.methods.pairs import forward_views, pair_and_generated, whole_views


class SimSiam(nn.Module):
    """A predictor maps the projection of each view to that of the other, whose gradient is stopped.

    Args:
        config: projector and predictor sizes.
        backbone: maps float [B, 3, S, S] to float [B, feature_dim] and has the attribute `feature_dim`.
    """

    Config = SimSiamConfig

    def __init__(self, config: SimSiamConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        hidden = [config.projector_hidden_dim] * (config.projector_layers - 1)
        dim = config.projector_output_dim
        # Section 3: batch norm after every layer, the last without learnt scale and shift (the official code).
        self.projector = mlp(self.feature_dim, *hidden, dim, last_norm="plain")
        self.predictor = mlp(dim, config.predictor_hidden_dim, dim)

    def step(self, views: Views) -> StepOutput:
        """Returns the symmetric negative cosine (equation 4) of the pair, and of the generated views."""
        z = forward_views(self._project, whole_views(views, "simsiam"), self.config.batch_statistics)
        p = forward_views(self.predictor, z, self.config.batch_statistics)
        targets = [projections.detach() for projections in z]

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            there = negative_cosine(p[first], targets[second], weights)
            back = negative_cosine(p[second], targets[first], weights)
            return (there + back) / 2

        return pair_and_generated(compare, views, self.config.generated_weight)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns backbone features float [B, feature_dim]."""
        features: torch.Tensor = self.backbone(images)
        return features

    def after_step(self, done: float) -> None:
        """SimSiam keeps no moving average and no queue."""

    def _project(self, images: torch.Tensor) -> torch.Tensor:
        projections: torch.Tensor = self.projector(self.backbone(images))
        return projections
