"""Losses against naive loops in float64, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from genssl.methods.losses import nt_xent


def naive_nt_xent(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR's equation 1, anchor by anchor."""
    z = torch.cat([z1, z2])
    z = z / z.norm(dim=1, keepdim=True)
    n, total = len(z1), torch.zeros((), dtype=z.dtype)
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        similarities = [torch.dot(z[i], z[k]) / temperature for k in range(2 * n) if k != i]
        total = total + torch.logsumexp(torch.stack(similarities), 0) - torch.dot(z[i], z[positive]) / temperature
    return total / (2 * n)


@pytest.mark.parametrize(("n", "d", "temperature"), [(1, 4, 0.5), (5, 3, 0.2), (8, 16, 0.07)])
def test_nt_xent_equals_the_naive_loop(n, d, temperature):
    generator = torch.Generator().manual_seed(n)
    z1, z2 = (torch.randn((n, d), generator=generator, dtype=torch.float64) for _ in range(2))
    ours = [z.float().requires_grad_() for z in (z1, z2)]
    theirs = [z.clone().requires_grad_() for z in (z1, z2)]
    loss, expected = nt_xent(*ours, temperature), naive_nt_xent(*theirs, temperature)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad.double(), b.grad, atol=1e-5)


def test_nt_xent_of_indistinguishable_views_is_the_logarithm_of_the_others():
    z = torch.ones((6, 3))
    assert float(nt_xent(z, z, 0.5)) == pytest.approx(math.log(11))
