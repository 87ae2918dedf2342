"""How large batches may be: less than the engine's buckets once the device ran out of memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from genssl.server.batching.cost import KEYS
from genssl.server.batching.schedule import BatchKey


class MemoryLimits:
    """Buckets by batch key, for any thread. Memory depends on the key: its image size, its guidance.

    Args:
        buckets: ascending batch sizes, used where memory has not run out.
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
