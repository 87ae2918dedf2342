"""How many steps ahead variants are asked for."""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import numpy as np

from genssl.variants.ledger import Ledger

FIRST_DEPTH = 8
DEEPEST = 1024
EVERY = 50
EARLY = (5, 10, 20, 30, 40)  # steps after which the first, rough guesses are made
GROWTH = 4
STEP_TIMES = 50


class PrefetchDepth:
    """The number of steps, given, or worked out by Little's law from what was measured; never more than D_max.

    "auto" is min(D_max, ceil(p95 of fetch latency / median step time) + 2). It is recomputed after 5, 10, 20, 30 and 40
    steps and then every 50, and grows at most fourfold each time, so that the first answer of a server that is still
    warming up does not announce half an epoch at once. D_max (`most`) is what fits `max_bytes`, and at most 1024.

    Attributes:
        steps: the depth now; under "auto" `first` before anything was measured.
        note: says, for the user, that a given number was cut to D_max and what to do; empty if it was not.
    """

    def __init__(
        self,
        setting: Literal["auto"] | int,
        *,
        bytes_per_step: float,
        max_bytes: int,
        ledger: Ledger,
        first: int = FIRST_DEPTH,
    ) -> None:
        self._auto = setting == "auto"
        self._ledger = ledger
        self.most = max(1, min(DEEPEST, int(max_bytes // max(1.0, bytes_per_step))))
        self.steps = min(first if setting == "auto" else setting, self.most)
        self.note = ""
        if setting != "auto" and setting > self.most:
            self.note = (
                f"variants.prefetch_steps is {setting}, but variants.prefetch_bytes ({max_bytes:,}) holds no more than "
                f"the variants of {self.most} steps, so {self.most} are asked for ahead; raise prefetch_bytes to "
                f"{math.ceil(setting * bytes_per_step):,} or lower prefetch_steps"
            )
        self._seconds: deque[float] = deque(maxlen=STEP_TIMES)
        self._done = 0
        ledger.prefetch_depth = self.steps

    def step_done(self, seconds: float) -> None:
        """Counts a step that took so many seconds, waiting for variants left out."""
        self._seconds.append(seconds)
        self._done += 1
        if self._auto and self._ledger.fetch_seconds and (self._done in EARLY or self._done % EVERY == 0):
            self.steps = self._measured()
            self._ledger.prefetch_depth = self.steps

    def _measured(self) -> int:
        step = max(1e-6, float(np.median(self._seconds)))
        return max(1, min(self.most, GROWTH * self.steps, math.ceil(self._ledger.fetch_percentile(95) / step) + 2))


def bytes_per_step(batch_size: int, views: int, probability: float, image_size: int) -> float:
    """Returns the bytes of a step's variants, uint8 [N, 3, S, S], that hardly any step exceeds (mean and 4 deviations).

    A batch has `batch_size` sources, of each of which so many views are variants with this probability.
    """
    slots = batch_size * views
    deviation = math.sqrt(slots * probability * (1 - probability))
    return min(slots, slots * probability + 4 * deviation) * 3 * image_size**2
