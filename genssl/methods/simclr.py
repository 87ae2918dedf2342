"""SimCLR (Chen et al. 2020, arXiv 2002.05709).

Deviations: none in the loss; the projector's output has no batch norm, as in solo-learn and unlike the original's
TensorFlow code.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.methods.base import StepOutput, Views
from genssl.methods.configs import SimCLRConfig
from genssl.methods.losses import nt_xent


class SimCLR(nn.Module):
    """A backbone and a two-layer projector, trained by NT-Xent between the two views of a batch.

    Args:
        config: projector sizes and temperature.
        backbone: maps float [B, 3, S, S] to float [B, feature_dim] and has the attribute `feature_dim`.
    """

    Config = SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        self.temperature = config.temperature
        self.projector = nn.Sequential(
            nn.Linear(self.feature_dim, config.projector_hidden_dim, bias=False),
            nn.BatchNorm1d(config.projector_hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(config.projector_hidden_dim, config.projector_output_dim),
        )

    def step(self, views: Views) -> StepOutput:
        """Returns the NT-Xent loss of the pair."""
        first, second = views.pair
        # One forward for both views, as in the original code: where one view is generated, separate forwards would
        # normalise each kind by its own batch statistics, and the running ones would fit neither.
        z1, z2 = self.projector(self.backbone(torch.cat([first, second]))).chunk(2)
        return StepOutput(loss=nt_xent(z1, z2, self.temperature))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns backbone features float [B, feature_dim]."""
        features: torch.Tensor = self.backbone(images)
        return features

    def after_step(self, done: float) -> None:
        """SimCLR keeps no moving average and no queue."""
