"""The view plan: a pure function of (run seed, epoch, step, rank) that says what every slot of a batch holds.

It decides which sources a batch has, which of their views are variants, and which index each of those has; nothing that
happens while training (speed, order of arrival, restarts) can change it.

Every image of a batch has columns, each of which holds one variant or the image itself. Mostly a column is a view: the
two of the pair, then the further ones of policy `third`. Under `added` there is one, of which both views are made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from genssl.base.devices import stream
from genssl.config.views import Policy
from genssl.data.base import ImageDataset
from genssl.variants.source import REAL, VariantRequest
from genssl.variants.usage import PlannedUsage

VIEWS = 2  # of a pair


@dataclass(frozen=True)
class StepPlan:
    """One batch of one rank: step `step` of epoch `epoch`.

    Attributes:
        rows: int64 [B], rows of the data set.
        indices: int64 [B, C]; for each column the index of its variant, or REAL.
        start: position of the first row within the global batch, over all ranks.
        batch_size: of the global batch; 0: this is all of it.
        requests: the variants that it wants, row by row, first column before second; see `with_requests`.
    """

    epoch: int
    step: int
    rows: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    start: int = 0
    batch_size: int = 0
    requests: tuple[VariantRequest, ...] = ()

    def with_requests(self, dataset: ImageDataset) -> StepPlan:
        """Returns the plan with its requests, which name the images of a data set; once a step, since that is work."""
        requests = []
        for row, indices in zip(self.rows.tolist(), self.indices, strict=True):
            wanted = indices[indices != REAL].tolist()
            source_id = dataset.source_id(row) if wanted else b""
            requests += [VariantRequest(row, source_id, index) for index in wanted]
        return replace(self, requests=tuple(requests))


def variant_columns(policy: Policy, third_count: int = 1) -> tuple[int, tuple[int, ...]]:
    """Returns the number of columns that a policy has, and those which may hold variants."""
    if policy == "third":
        return VIEWS + third_count, tuple(range(VIEWS, VIEWS + third_count))
    if policy == "added":
        return 1, (0,)
    return VIEWS, {"none": (), "second": (1,), "both": (0, 1)}[policy]


def view_columns(columns: int) -> tuple[int, ...]:
    """Returns, for each view, the column that it is made of, when there are so many columns."""
    return (0,) * VIEWS if columns == 1 else tuple(range(columns))


def fresh_indices(seed: int, epoch: int, columns: int) -> npt.NDArray[np.int64]:
    """Returns int64 [columns], the indices of an epoch under per_image: fresh; none comes twice in a run.

    Runs with other seeds have another range of indices, so that their variants are independent.
    """
    return np.int64(seed) * 2**32 + epoch * columns + np.arange(columns)


def draw_indices(
    *,
    seed: int,
    epoch: int,
    num_sources: int,
    policy: Policy,
    probability: float,
    per_image: Literal["fresh"] | int,
    third_count: int = 1,
) -> npt.NDArray[np.int64]:
    """Draws which columns of an epoch hold variants, and of which index; the arguments are those of `ViewPlan`.

    Drawn for all sources at once, so that no slot depends on batch, rank or order; and for each column by itself.

    Returns:
        int64 [num_sources, C]; for each column the index of its variant, or REAL.
    """
    columns, variant = variant_columns(policy, third_count)
    draws, shape = stream("variants", seed, epoch), (num_sources, columns)
    is_variant = (torch.rand(shape, generator=draws) < probability).numpy()
    is_variant[:, [column for column in range(columns) if column not in variant]] = False
    if per_image == "fresh":
        numbers = np.broadcast_to(fresh_indices(seed, epoch, columns), shape)
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
        policy: which views may be variants; see `ViewsConfig`.
        probability: that a column which may hold a variant does, drawn per source and epoch.
        per_image: "fresh" (an index is never used twice in a run), or K (uniform in 0..K-1, with replacement).
        third_count: how many views beside the pair the policy `third` adds.
        rank, world_size: this rank's slice of every global batch.
    """

    def __init__(
        self,
        *,
        seed: int,
        num_sources: int,
        batch_size: int,
        policy: Policy,
        probability: float,
        per_image: Literal["fresh"] | int,
        third_count: int = 1,
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
        self._third_count = third_count
        self._rank, self._local = rank, batch_size // world_size
        self._epoch: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def step(self, epoch: int, step: int) -> StepPlan:
        """Returns this rank's part of batch `step` (0 <= step < steps_per_epoch) of epoch `epoch` (from 0)."""
        order, indices = self._of_epoch(epoch)
        start = step * self._batch_size + self._rank * self._local
        rows = order[start : start + self._local]
        return StepPlan(epoch, step, rows, indices[rows], start - step * self._batch_size, self._batch_size)

    def usage(self) -> PlannedUsage:
        """Returns what counts the variants of this plan that are used; so far none."""
        columns, _ = variant_columns(self._policy, self._third_count)
        first = int(fresh_indices(self._seed, 0, columns)[0]) if self._per_image == "fresh" else 0
        return PlannedUsage(self._num_sources, self._per_image, first=first, columns=columns)

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
                third_count=self._third_count,
            )
            self._epoch = (epoch, order, indices)
        return self._epoch[1], self._epoch[2]
