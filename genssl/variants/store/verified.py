"""Which records of an environment this process has verified, so that a checksum is computed once and not per read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SLOTS = 2**20  # 8 MB where they are all used; memory is taken as they fill


class VerifiedRecords:
    """A table of digests of bounded size.

    Every digest has one slot, told by its first half, which holds its second half, mixed with a hash of the record that
    was verified under it: a digest is not known for the record of another variant, to which a damaged tree may lead
    later. Two digests that share a slot drive each other out and are verified again, so a set that is larger than the
    table is served more slowly and no less surely; what was not verified passes with a probability of 2**-63.

    Threads may use one table at once: a lost entry is verified again.

    Args:
        slots: a power of two.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        assert slots & (slots - 1) == 0, "the slot is some bits of the digest"
        self._mask = np.uint64(slots - 1)
        self._seconds = np.zeros(slots, np.uint64)

    def known(self, digests: Sequence[bytes], hashes: Sequence[int]) -> list[bool]:
        """Says of every digest (16 bytes) whether it was added with this hash of a record (64 bits, signed)."""
        slots, seconds = self._split(digests, hashes)
        known: list[bool] = (self._seconds[slots] == seconds).tolist()
        return known

    def add(self, digests: Sequence[bytes], hashes: Sequence[int]) -> None:
        """Enters digests of 16 bytes, each with a hash of its record."""
        slots, seconds = self._split(digests, hashes)
        self._seconds[slots] = seconds

    def _split(self, digests: Sequence[bytes], hashes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        # An empty slot is 0, which nothing that is entered may equal.
        mixed = halves[:, 1] ^ np.array(hashes, np.int64).view(np.uint64)
        return halves[:, 0] & self._mask, mixed | np.uint64(1)
