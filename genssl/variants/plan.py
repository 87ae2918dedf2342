"""The view plan: a pure function of (run seed, epoch, step, rank) that says what every slot of a batch holds.

It decides which sources a batch has, which of their views are variants, and which index each of those has; nothing that
happens while training (speed, order of arrival, restarts) can change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from genssl.runtime import stream

REAL = -1
VIEWS = 2


@dataclass(frozen=True)
class StepPlan:
    """One batch of one rank.

    Attributes:
        epoch, step: where in the run; step counts within the epoch.
        rows: int64 [B], rows of the data set.
        indices: int64 [B, 2]; for each view the index of its variant, or REAL.
    """

    epoch: int
    step: int
    rows: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]


def draw_indices(
    *,
    seed: int,
    epoch: int,
    num_sources: int,
    policy: Literal["second", "both", "none"],
    probability: float,
    per_image: Literal["fresh"] | int,
) -> npt.NDArray[np.int64]:
    """Draws which views of an epoch are variants, and of which index; the arguments are those of `ViewPlan`.

    Drawn for all sources at once, so that no slot depends on batch, rank or order.

    Returns:
        int64 [num_sources, 2]; for each view the index of its variant, or REAL.
    """
    draws, shape = stream("variants", seed, epoch), (num_sources, VIEWS)
    is_variant = (torch.rand(shape, generator=draws) < probability).numpy()
    views = {"none": (), "second": (1,), "both": (0, 1)}[policy]
    for view in range(VIEWS):
        if view not in views:
            is_variant[:, view] = False
    if per_image == "fresh":
        # Runs with other seeds draw from another range of indices, so that their variants are independent.
        numbers = np.broadcast_to(np.int64(seed) * 2**32 + epoch * VIEWS + np.arange(VIEWS), shape)
    else:
        numbers = torch.randint(0, per_image, shape, generator=draws).numpy()
    return np.where(is_variant, numbers, REAL)


class ViewPlan:
    """All batches of a run.

    Each epoch visits the rows in a new order; rows that do not fill the last batch are left out of that epoch.

    Args:
        seed: the run's seed.
        num_sources: rows of the data set.
        batch_size: sources in a global batch, over all ranks.
        policy: which views may be variants.
        probability: of each such view, drawn per source and epoch.
        per_image: "fresh" (an index is never used twice in a run), or K (uniform in 0..K-1).
        rank, world_size: this rank's slice of every global batch.
    """

    def __init__(
        self,
        *,
        seed: int,
        num_sources: int,
        batch_size: int,
        policy: Literal["second", "both", "none"],
        probability: float,
        per_image: Literal["fresh"] | int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size > num_sources:
            raise ValueError(f"a batch of {batch_size} is more than the {num_sources} images of the data set")
        if batch_size % world_size:
            raise ValueError(f"a global batch of {batch_size} does not divide among {world_size} ranks")
        self.steps_per_epoch = num_sources // batch_size
        self._seed, self._num_sources, self._batch_size = seed, num_sources, batch_size
        self._policy, self._probability, self._per_image = policy, probability, per_image
        self._rank, self._local = rank, batch_size // world_size
        self._epoch: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def step(self, epoch: int, step: int) -> StepPlan:
        """Returns this rank's part of batch `step` (0 <= step < steps_per_epoch) of epoch `epoch` (from 0)."""
        order, indices = self._of_epoch(epoch)
        start = step * self._batch_size + self._rank * self._local
        rows = order[start : start + self._local]
        return StepPlan(epoch=epoch, step=step, rows=rows, indices=indices[rows])

    def _of_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if self._epoch is None or self._epoch[0] != epoch:
            order = torch.randperm(self._num_sources, generator=stream("order", self._seed, epoch)).numpy()
            indices = draw_indices(
                seed=self._seed,
                epoch=epoch,
                num_sources=self._num_sources,
                policy=self._policy,
                probability=self._probability,
                per_image=self._per_image,
            )
            self._epoch = (epoch, order, indices)
        return self._epoch[1], self._epoch[2]
