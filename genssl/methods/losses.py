"""Losses of the methods: pure functions, no modules, no state, no communication between ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def nt_xent(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """Normalised temperature-scaled cross entropy (SimCLR, equation 1), averaged over all 2 N anchors.

    google-research/simclr reports twice this value (it sums the two directions).

    Args:
        z1, z2: projections float [N, D] of the two views; row i of both is the same source. Any scale.
        temperature: above 0.

    Returns:
        The scalar loss.
    """
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    positives = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, positives)
