"""SimCLR (Chen et al. 2020, arXiv 2002.05709).

Deviations: none in the loss; the projector's output has no batch norm, as in solo-learn and unlike the original's
TensorFlow code.

Generated views: a weighted NT-Xent term with the first view, or, with `multi_positive`, StableRep's loss over all views
of a source.
"""

from __future__ import annotations

import torch
from torch import nn

from genssl.base.gather import gather, gather_weights
from genssl.methods.base import MethodBase, StepOutput, Views, forward_views, pair_and_generated, whole_views
from genssl.methods.configs import SimCLRConfig
from genssl.methods.losses import multi_positive_nt_xent, nt_xent
from genssl.methods.parts import mlp


class SimCLR(MethodBase[SimCLRConfig]):
    """A backbone and a two-layer projector, trained by NT-Xent between the two views of a batch.

    Args:
        config: projector sizes and temperature.
        backbone: see `MethodBase`.
    """

    Config = SimCLRConfig

    def __init__(self, config: SimCLRConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.projector = mlp(self.feature_dim, config.projector_hidden_dim, config.projector_output_dim)

    def step(self, views: Views) -> StepOutput:
        """Returns the NT-Xent loss of the pair, and of the generated views if there are any."""
        outputs = forward_views(self.project, whole_views(views, "simclr"), self.config.batch_statistics)
        z = [gather(output) for output in outputs]

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            return nt_xent(z[first], z[second], self.config.temperature, gather_weights(weights))

        if not (self.config.multi_positive and views.generated):
            return pair_and_generated(compare, views, self.config.generated_weight)
        view_weights = z[0].new_tensor([1.0, 1.0] + [self.config.generated_weight] * len(views.generated))
        weights = gather_weights(views.pair_weights)
        loss = multi_positive_nt_xent(torch.stack(z), self.config.temperature, view_weights, weights)
        return StepOutput(loss=loss)
