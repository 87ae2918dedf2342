"""VICReg (Bardes et al. 2022, arXiv 2105.04906).

Deviations from the official code: none; `genssl.methods.losses.vicreg` says where that code and the paper's equations
differ. solo-learn's variance term is the sum of the two views', here it is their mean, as in the official code: its
weight of 25 is 50 here.

Generated views: the same loss with the first view.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.base.gather import gather, gather_weights
from genssl.methods.base import MethodBase, StepOutput, Views, forward_views, pair_and_generated, whole_views
from genssl.methods.configs import VICRegConfig
from genssl.methods.losses import vicreg
from genssl.methods.parts import mlp


class VICReg(MethodBase[VICRegConfig]):
    """A backbone and a three-layer expander; variance and covariance terms keep the embeddings from collapsing.

    Args:
        config: projector sizes, and the weights of the three terms.
        backbone: see `MethodBase`.
    """

    Config = VICRegConfig

    def __init__(self, config: VICRegConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        hidden = config.projector_hidden_dim
        self.projector = mlp(self.feature_dim, hidden, hidden, config.projector_output_dim, last_bias=False)

    def step(self, views: Views) -> StepOutput:
        """Returns the variance-invariance-covariance loss of the pair, and of the generated views."""
        outputs = forward_views(self.project, whole_views(views, "vicreg"), self.config.batch_statistics)
        z = [gather(output) for output in outputs]
        config = self.config
        terms = (config.invariance_weight, config.variance_weight, config.covariance_weight)

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            return vicreg(z[first], z[second], *terms, gather_weights(weights))

        return pair_and_generated(compare, views, config.generated_weight)
