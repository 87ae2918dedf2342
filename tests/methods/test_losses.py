"""Losses against naive loops in float64: value and gradient, odd batches, with and without weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import naive_losses
import pytest
import torch

from genssl.methods import losses


@dataclass
class Case:
    """A loss, its arguments at a size of batch, and how many of them have a gradient."""

    name: str
    arguments: Callable[[int, torch.Generator], tuple[Any, ...]]
    smallest_batch: int = 1  # a variance needs 2
    differentiable: int = 2


def rows(n: int, generator: torch.Generator, *, d: int = 4) -> torch.Tensor:
    return 3 * torch.randn((n, d), generator=generator, dtype=torch.float64)


def units(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(rows(n, generator), dim=1)


CASES = [
    Case("nt_xent", lambda n, g: (rows(n, g), rows(n, g), 0.2)),
    Case(
        "multi_positive_nt_xent",
        lambda n, g: (
            torch.stack([rows(n, g) for _ in range(3)]),
            0.3,
            torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64),
        ),
        differentiable=1,
    ),
    Case("negative_cosine", lambda n, g: (rows(n, g), rows(n, g))),
    Case("byol", lambda n, g: (rows(n, g), rows(n, g))),
    Case("barlow_twins", lambda n, g: (rows(n, g), rows(n, g), 0.05), smallest_batch=2),
    Case("info_nce", lambda n, g: (rows(n, g), rows(n, g), units(6, g), 0.2)),
    Case("vicreg", lambda n, g: (0.3 * rows(n, g), 0.3 * rows(n, g), 25.0, 20.0, 2.0), smallest_batch=2),
    Case("nnclr", lambda n, g: (rows(n, g), rows(n, g), 0.1)),
    Case("dino", lambda n, g: (rows(n, g), rows(n, g), rows(1, g)[0], 0.05, 0.1)),
]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def drawn(case: Case, n: int) -> tuple[tuple[Any, ...], torch.Tensor]:
    """The arguments, and weights with mean 1."""
    generator = torch.Generator().manual_seed(n)
    arguments = case.arguments(n, generator)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    return arguments, weights / weights.mean()


def value_and_gradients(loss: Callable[..., torch.Tensor], case: Case, arguments: tuple[Any, ...], *rest: Any) -> Any:
    leaves = [argument.clone().requires_grad_() for argument in arguments[: case.differentiable]]
    value = loss(*leaves, *arguments[case.differentiable :], *rest)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("case", "n"),
    [pytest.param(case, n, id=f"{case.name}-{n}") for case in CASES for n in (1, 2, 5, 7) if n >= case.smallest_batch],
)
def test_a_loss_equals_its_naive_loop(case, n, weighted):
    arguments, weights = drawn(case, n)
    ours = value_and_gradients(getattr(losses, case.name), case, arguments, weights if weighted else None)
    ones = torch.ones(n, dtype=torch.float64)
    naive = value_and_gradients(getattr(naive_losses, case.name), case, arguments, weights if weighted else ones)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in naive[1]) or n == 1


@CASE
def test_equal_weights_are_no_weights(case):
    arguments, _ = drawn(case, 5)
    loss = getattr(losses, case.name)
    torch.testing.assert_close(loss(*arguments, torch.ones(5, dtype=torch.float64)), loss(*arguments, None))


@CASE
def test_inside_autocast_a_loss_of_half_precision_is_that_of_float32(case):
    """Logits of bfloat16 at a temperature of 0.1 would be off by several per cent."""
    arguments, weights = drawn(case, 5)
    half = [a.bfloat16() if isinstance(a, torch.Tensor) else a for a in arguments]
    full = [a.float() if isinstance(a, torch.Tensor) else a for a in half]
    loss = getattr(losses, case.name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*half, weights.float())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(*full, weights.float()))


def test_nt_xent_of_indistinguishable_views_is_the_logarithm_of_the_others():
    z = torch.ones((6, 3))
    assert float(losses.nt_xent(z, z, 0.5)) == pytest.approx(math.log(11))


def test_multi_positive_nt_xent_of_two_views_is_nt_xent():
    z = torch.randn((2, 7, 4), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([2, 1, 1, 1, 1, 1, 0.0])
    torch.testing.assert_close(losses.multi_positive_nt_xent(z, 0.2), losses.nt_xent(z[0], z[1], 0.2))
    torch.testing.assert_close(
        losses.multi_positive_nt_xent(z, 0.2, None, weights), losses.nt_xent(z[0], z[1], 0.2, weights)
    )


def test_a_weight_of_two_in_barlow_twins_is_a_source_that_occurs_twice():
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn((4, 3), generator=generator, dtype=torch.float64) for _ in range(2))
    occurring = torch.tensor([0, 1, 1, 2, 3, 3])
    weights = torch.tensor([1, 2, 1, 2], dtype=torch.float64) * 4 / 6
    torch.testing.assert_close(
        losses.barlow_twins(z1, z2, 0.1, weights), losses.barlow_twins(z1[occurring], z2[occurring], 0.1)
    )


def test_barlow_twins_of_decorrelated_equal_views_is_zero():
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert float(losses.barlow_twins(z, z, 0.1)) == pytest.approx(0, abs=1e-8)
    assert float(losses.barlow_twins(z, z[:, [0, 0]], 0.1)) == pytest.approx(1 + 0.1, abs=1e-4)
