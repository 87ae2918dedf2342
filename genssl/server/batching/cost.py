"""How long batches take and how large they may be: learnt from those that ran, for each batch key.

A batch takes a fixed time and a time for each row of its bucket: seconds = a * bucket + b. A bucket that has run is
taken at its own running mean; the line, fitted to these means by least squares, speaks for buckets that have not.
(Means by bucket, and not sums over all batches: the sums forget a bucket that is rare, and then have no slope.)
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genssl.server.batching.schedule import BatchKey

NEWEST_WEIGHT = 0.1  # of a new batch in the running mean, after the first ten
OUTLIER = 4.0  # a batch that took more than this many times what was expected counts as this many
SPLIT_SAVES = 0.1  # of the time, at least; for less, one padded batch is better than several
KEYS = 256  # clients choose parameters and with them keys, so there must be an end


@dataclass(slots=True)
class _Mean:
    seconds: float
    batches: int = 1

    def add(self, seconds: float) -> None:
        self.batches += 1
        if self.batches == 2 and seconds < self.seconds:
            # The first batch of a shape also pays for the choice of kernels.
            self.seconds = seconds
            return
        if OUTLIER * seconds < self.seconds:
            # Much can hold a batch up, nothing can make it faster than it is: the mean was of something else.
            self.seconds, self.batches = OUTLIER * seconds, 1
            return
        weight = max(1 / self.batches, NEWEST_WEIGHT)
        self.seconds += weight * (min(seconds, OUTLIER * self.seconds) - self.seconds)


class CostModel:
    """What batches cost, for any thread: the device's teaches it, the event loop's asks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock, self._clock = threading.RLock(), clock
        self._means: OrderedDict[BatchKey, dict[int, _Mean]] = OrderedDict()
        self._observed: dict[BatchKey | None, float] = {}

    @property
    def latest_key(self) -> BatchKey | None:
        """The key observed last, which stands for those that have not been observed; None before any batch."""
        with self._lock:
            return next(reversed(self._means), None)

    def age(self, key: BatchKey | None) -> float:
        """Returns the seconds since a batch of this very key was observed; infinity if none was."""
        with self._lock:
            return self._clock() - self._observed.get(key, float("-inf"))

    def observe(self, key: BatchKey, bucket: int, seconds: float) -> None:
        """Learns that a batch of `bucket` rows, padding included, took `seconds`."""
        with self._lock:
            means = self._means.setdefault(key, {})
            self._means.move_to_end(key)
            self._observed[key] = self._clock()
            if bucket in means:
                means[bucket].add(seconds)
            else:
                # The first batch of a shape also pays for the choice of kernels, and may stay the only one for long.
                confirmed = {size: mean for size, mean in means.items() if mean.batches > 1}
                if len(confirmed) > 1:
                    slope, fixed = _line(confirmed)
                    seconds = min(seconds, OUTLIER * (slope * bucket + fixed))
                means[bucket] = _Mean(seconds)
            if len(self._means) > KEYS:
                forgotten, _ = self._means.popitem(last=False)
                del self._observed[forgotten]

    def seconds(self, key: BatchKey, bucket: int) -> float | None:
        """Returns how long a batch of `bucket` rows takes; None before any batch of any key has been observed."""
        with self._lock:
            means = self._of(key)
            if not means:
                return None
            if bucket in means:
                return means[bucket].seconds
            slope, fixed = _line(means)
            return slope * bucket + fixed

    def predict(self, key: BatchKey, rows: int, buckets: Sequence[int]) -> float | None:
        """Returns how long `rows` rows take in the cheapest batches; None before anything has been observed."""
        full, rest = divmod(rows, buckets[-1])
        largest = self.seconds(key, buckets[-1])
        return None if largest is None else full * largest + self._cheapest(key, rest, buckets)[0]

    def next_batch(self, key: BatchKey, rows: int, buckets: Sequence[int]) -> tuple[int, int]:
        """Returns how many of `rows` waiting rows to take now, and the bucket to pad them to.

        Of 17 rows and buckets 1, 4, 16, 64, either all are padded to 64, or 16 go now and the last one after them:
        whichever is done with all of them clearly sooner. Until two buckets have run, all are padded: from one alone it
        cannot be told what a row costs and what a batch.
        """
        if rows >= buckets[-1]:
            return buckets[-1], buckets[-1]
        with self._lock:
            known = len(self._of(key))
        if known < 2:
            return rows, next(size for size in buckets if size >= rows)
        bucket = self._cheapest(key, rows, buckets)[1]
        return min(rows, bucket), bucket

    def _of(self, key: BatchKey) -> dict[int, _Mean]:
        return self._means.get(key) or self._means.get(self.latest_key) or {}

    def _cheapest(self, key: BatchKey, rows: int, buckets: Sequence[int]) -> tuple[float, int]:
        """Returns the seconds of the cheapest batches for fewer rows than buckets[-1], and the first one's bucket."""
        if rows == 0:
            return 0.0, 0
        above = next(size for size in buckets if size >= rows)
        padded = self.seconds(key, above)
        below = max((size for size in buckets if size < rows), default=0)
        if padded is None or not below:
            return padded or 0.0, above
        batches, rest = divmod(rows, below)
        split = batches * (self.seconds(key, below) or 0.0) + self._cheapest(key, rest, buckets)[0]
        return (split, below) if split < (1 - SPLIT_SAVES) * padded else (padded, above)


class MemoryLimits:
    """Buckets by batch key, for any thread: the engine's, and fewer once the device ran out of memory.

    Memory depends on the key: its image size, its guidance.
    """

    def __init__(self, buckets: Sequence[int]) -> None:
        self._engine_buckets = buckets
        self._lock = threading.Lock()
        self._limits: OrderedDict[BatchKey, int] = OrderedDict()

    @property
    def largest(self) -> int:
        """The least of all keys' largest buckets."""
        with self._lock:
            return min(self._limits.values(), default=self._engine_buckets[-1])

    def buckets(self, key: BatchKey) -> Sequence[int]:
        """Returns the buckets that a batch key may use, ascending."""
        limit = self._limits.get(key)
        if limit is None:
            return self._engine_buckets
        return [bucket for bucket in self._engine_buckets if bucket < limit] + [limit]

    def halve(self, key: BatchKey, bucket: int) -> int:
        """Learns that a batch of `bucket` > 1 rows did not fit; returns the largest one allowed from now on."""
        with self._lock:
            # Of several parts that wait to be tried again, an older one may be larger than what was learnt since.
            limit = self._limits[key] = min(bucket // 2, self._limits.get(key, bucket))
            if len(self._limits) > KEYS:
                self._limits.popitem(last=False)
        return limit


def _line(means: dict[int, _Mean]) -> tuple[float, float]:
    """Fits seconds per row and fixed seconds, neither below 0, by least squares of the relative error.

    With one bucket known, all of its time is put down to its rows: too much for larger buckets, too little for smaller.
    """
    points = [
        (bucket, mean.seconds, min(mean.batches, 1 / NEWEST_WEIGHT) / max(mean.seconds, 1e-9) ** 2)
        for bucket, mean in means.items()
    ]
    total = sum(weight for _, _, weight in points)
    x_mean = sum(weight * x for x, _, weight in points) / total
    y_mean = sum(weight * y for _, y, weight in points) / total
    spread = sum(weight * (x - x_mean) ** 2 for x, _, weight in points)
    if len(points) > 1 and spread > 0:
        slope = sum(weight * (x - x_mean) * (y - y_mean) for x, y, weight in points) / spread
        if slope < 0:
            return 0.0, y_mean
        if (fixed := y_mean - slope * x_mean) >= 0:
            return slope, fixed
    return sum(w * x * y for x, y, w in points) / sum(w * x * x for x, _, w in points), 0.0
