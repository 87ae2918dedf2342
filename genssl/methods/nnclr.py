"""NNCLR (Dwibedi et al. 2021, arXiv 2104.14548).

Deviation from the paper: embeddings enter the queue after the optimiser's step, whatever their number. It says nothing
of how views share batch norm; here they do, as in SimCLR.

Generated views: the same symmetric loss with the first view; they do not enter the queue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genssl.base.gather import gather, gather_weights
from genssl.methods.base import MethodBase, StepOutput, Views, forward_views, pair_and_generated, whole_views
from genssl.methods.configs import NNCLRConfig
from genssl.methods.losses import nnclr
from genssl.methods.parts import Queue, mlp


class NNCLR(MethodBase[NNCLRConfig]):
    """The positive of a prediction is the nearest neighbour, in a queue, of the other view's embedding.

    Args:
        config: projector and predictor sizes, temperature, queue size.
        backbone: see `MethodBase`.
    """

    Config = NNCLRConfig

    def __init__(self, config: NNCLRConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        hidden, dim = config.projector_hidden_dim, config.projector_output_dim
        self.projector = mlp(self.feature_dim, hidden, hidden, dim, last_norm="affine")
        self.predictor = mlp(dim, config.predictor_hidden_dim, dim)
        self.queue = Queue(config.queue_size, dim)
        self._new_embeddings: list[torch.Tensor] = []  # of the steps since the last `after_step`

    def step(self, views: Views) -> StepOutput:
        """Returns the symmetric loss of the pair (section 3.2), and of the generated views."""
        z = forward_views(self.project, whole_views(views, "nnclr"), self.config.batch_statistics)
        p = [gather(output) for output in forward_views(self.predictor, z, self.config.batch_statistics)]
        neighbours = [gather(self._nearest(embeddings.detach())) for embeddings in z]
        self._new_embeddings.append(gather(z[0].detach()))

        def compare(first: int, second: int, weights: torch.Tensor | None) -> torch.Tensor:
            weights = gather_weights(weights)
            there = nnclr(neighbours[first], p[second], self.config.temperature, weights)
            back = nnclr(neighbours[second], p[first], self.config.temperature, weights)
            return (there + back) / 2

        return pair_and_generated(compare, views, self.config.generated_weight)

    def after_step(self, done: float) -> None:
        """Puts the embeddings of the first views into the queue."""
        if self._new_embeddings:
            self.queue.push(torch.cat(self._new_embeddings))
            self._new_embeddings.clear()

    def _nearest(self, z: torch.Tensor) -> torch.Tensor:
        keys = self.queue.keys
        return keys[(F.normalize(z.to(keys.dtype), dim=1) @ keys.T).argmax(dim=1)]
