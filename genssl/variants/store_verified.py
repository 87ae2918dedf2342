"""Which records of an environment this process has verified, so that a checksum is computed once and not per read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SLOTS = 2**20  # 8 MB where they are all used; memory is taken as they fill


class VerifiedRecords:
    """A table of digests of bounded size.

    Every digest has one slot, told by its first half, which holds its second half. Two digests that share a slot drive
    each other out and are verified again, so a set that is larger than the table is served more slowly and no less
    surely; an unverified digest passes for a verified one with a probability of 2**-63.

    Threads may use one table at once: a lost entry is verified again.

    Args:
        slots: a power of two.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        assert slots & (slots - 1) == 0, "the slot is some bits of the digest"
        self._mask = np.uint64(slots - 1)
        self._seconds = np.zeros(slots, np.uint64)

    def known(self, digests: Sequence[bytes]) -> list[bool]:
        """Says of every digest (16 bytes) whether it was added."""
        slots, seconds = self._split(digests)
        known: list[bool] = (self._seconds[slots] == seconds).tolist()
        return known

    def add(self, digests: Sequence[bytes]) -> None:
        """Enters digests of 16 bytes."""
        slots, seconds = self._split(digests)
        self._seconds[slots] = seconds

    def _split(self, digests: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        # An empty slot is 0, which no digest may equal.
        return halves[:, 0] & self._mask, halves[:, 1] | np.uint64(1)
