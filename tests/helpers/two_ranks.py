"""Trains every method for a few steps, in float64, by one process or by one of two ranks.

    python two_ranks.py RANK STORE OUT

writes what `train` returns for every case, and the gather's gradients, to OUT/RANK.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from toys import SMALL, draw_views, make, part_of, without_batch_norm

from genssl.base.gather import gather

BATCH, STEPS, RANKS = 6, 3, 2
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {name: (name, {}, {}) for name in SMALL}
CASES |= {
    f"{name}+generated+weights": (name, {"generated_weight": 0.5}, {"generated": 2, "weighted": True}) for name in SMALL
}
CASES["simclr+multi_positive"] = (
    "simclr",
    {"multi_positive": True, "generated_weight": 0.5},
    {"generated": 2, "weighted": True},
)
CASES["dino+crops"] = ("dino", {}, {"crops": 2, "weighted": True})


def train(case: str, rank: int | None) -> dict[str, Any]:
    """Returns losses (their mean over the ranks), first gradients, and the final state."""
    name, settings, view_settings = CASES[case]
    method = without_batch_norm(make(name, **settings)).double()
    rows = slice(None) if rank is None else slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses, first_gradients = [], {}
    for number in range(STEPS):
        views = part_of(draw_views(BATCH, number, **view_settings), rows, torch.float64)
        optimizer.zero_grad()
        loss = method.step(views).loss
        loss.backward()
        losses.append(loss.detach().clone())
        if rank is not None:  # what DDP does, without the seconds that it takes to start; it leaves buffers alone
            for tensor in (losses[-1], *(parameter.grad for parameter in trained)):
                dist.all_reduce(tensor)
                tensor /= RANKS
        if number == 0:
            first_gradients = {
                key: value.grad.clone() for key, value in method.named_parameters() if value.requires_grad
            }
        optimizer.step()
        method.after_step((number + 1) / STEPS)
    return {"losses": torch.stack(losses), "gradients": first_gradients, "state": method.state_dict()}


def coefficients() -> torch.Tensor:
    """Of a loss that is linear in the gathered rows, different on each rank: [rank, dim, row]."""
    return torch.randn((RANKS, 4, 2 * 3), generator=torch.Generator().manual_seed(1))


def gather_gradient(rank: int) -> dict[str, torch.Tensor]:
    """The incoming gradient is the transpose of a contiguous tensor, so that it is not contiguous itself."""
    mine = torch.full((3, 4), float(rank)).requires_grad_()
    gathered = gather(mine)
    (gathered.T * coefficients()[rank]).sum().backward()
    return {"gathered": gathered.detach(), "gradient": mine.grad}


if __name__ == "__main__":
    rank, store, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {case: train(case, rank) for case in CASES}
    results["gather"] = gather_gradient(rank)
    torch.save(results, out / f"{rank}.pt")
    dist.destroy_process_group()
