"""SimSiam (Chen and He 2021, arXiv 2011.10566).

Deviation from the official code: its script keeps the predictor's learning rate constant (--fix-pred-lr); here all
parameters follow the recipe's schedule.

Generated views: the same symmetric loss with the first view.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.methods.base import MethodBase, StepOutput, Views, forward_views, pair_and_generated, whole_views
from genssl.methods.configs import SimSiamConfig
from genssl.methods.losses import negative_cosine
from genssl.methods.parts import mlp


class SimSiam(MethodBase[SimSiamConfig]):
    """A predictor maps the projection of each view to that of the other, whose gradient is stopped.

    Args:
        config: projector and predictor sizes.
        backbone: see `MethodBase`.
    """

    Config = SimSiamConfig

    def __init__(self, config: SimSiamConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        hidden = [config.projector_hidden_dim] * (config.projector_layers - 1)
        dim = config.projector_output_dim
        # Section 3: batch norm after every layer, the last without learnt scale and shift (the official code).
        self.projector = mlp(self.feature_dim, *hidden, dim, last_norm="plain")
        self.predictor = mlp(dim, config.predictor_hidden_dim, dim)

    def step(self, views: Views) -> StepOutput:
        """Returns the symmetric negative cosine (equation 4) of the pair, and of the generated views."""
        z = forward_views(self.project, whole_views(views, "simsiam"), self.config.batch_statistics)
        p = forward_views(self.predictor, z, self.config.batch_statistics)
        targets = [projections.detach() for projections in z]

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            there = negative_cosine(p[first], targets[second], weights)
            back = negative_cosine(p[second], targets[first], weights)
            return (there + back) / 2

        return pair_and_generated(compare, views, self.config.generated_weight)
