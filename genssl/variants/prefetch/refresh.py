"""Generates ahead of the plan, into the pool, with what the server has to spare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from genssl.data.base import ImageDataset
from genssl.variants.plan import ViewPlan
from genssl.variants.source import VariantRequest

SCANNED_STEPS = 4  # at most, in search of variants that the pool does not have


class Refreshable(Protocol):
    """A source that can be asked for variants which no step has announced; see `RemoteSource`."""

    announced: int

    @property
    def wants_refresh(self) -> bool:
        """Whether nothing that was asked for waits to be sent."""
        ...

    def refresh(self, requests: Sequence[VariantRequest]) -> Sequence[VariantRequest]:
        """Asks for those that are neither at hand nor under way; returns them."""
        ...


class Refresher:
    """Asks for up to `per_step` variants a training step that coming epochs will want, so that none is made in vain.

    The plan is one of its own, since a plan remembers one epoch only.
    """

    def __init__(self, plan: ViewPlan, epochs: int, dataset: ImageDataset, source: Refreshable, per_step: int) -> None:
        self._plan, self._steps = plan, epochs * plan.steps_per_epoch
        self._dataset, self._source, self._per_step = dataset, source, per_step
        self._position = 0  # the step of the run whose variants come next
        self._left: Sequence[VariantRequest] = []

    def step(self) -> None:
        """Asks for the next variants, unless some of the plan or of an earlier call wait to be sent."""
        if not self._source.wants_refresh:
            return
        announced = self._source.announced
        if self._position <= announced:
            # What the plan has announced is under way; the next epoch begins where a pool has most to gain.
            self._position = (announced // self._plan.steps_per_epoch + 1) * self._plan.steps_per_epoch
            self._left = []
        most = self._per_step
        for _ in range(SCANNED_STEPS):
            if not self._left:
                if self._position >= self._steps:
                    return
                planned = self._plan.step(*divmod(self._position, self._plan.steps_per_epoch))
                self._left = planned.with_requests(self._dataset).requests
                self._position += 1
            while self._left and most > 0:
                part, self._left = self._left[:most], self._left[most:]
                most -= len(self._source.refresh(part))
            if most <= 0:
                return
