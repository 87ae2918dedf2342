"""The pool of received variants, from which `late: reuse` takes a stand-in for one that is late.

All variants of a run have one size, so the images lie in a file of equal slots, without a name: private scratch, gone
with the process however it ends. Against LMDB, dropping the oldest is the reuse of a slot and needs no compaction; and
`pread` and `pwrite` report a full disk as an error, where writing to a mapped file would kill the process.

The index is a hash table with chains, newest first, in flat arrays beside the slots: 57 bytes an entry. A look-up walks
all entries of its source, so their number is bounded.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genssl.data.base import UInt8Array
from genssl.errors import UserError

log = logging.getLogger(__name__)

Name = tuple[bytes, int]  # source and index
MOST_PER_SOURCE = 32  # stand-ins enough for any max_reuse, and few to walk: 256 choices take 4 ms
FRESH, KEPT = 1, 2  # bits of an entry's marks
NONE = 0  # slots are numbered from 1, so that zeroed memory is an empty table, which costs nothing until it is touched


class PoolError(UserError):
    """A pool that cannot hold a single variant, or cannot make its file."""


class VariantPool:
    """Received variants by source, bounded in bytes and a source, the oldest dropped first. Thread-safe.

    What `choose` returns depends only on the order of the calls and their arguments.

    Args:
        folder: where the unnamed file is made; None: the system's folder for temporary files.
        max_bytes: of pixels held at once.
        max_reuse: how often one variant may stand in for others.
        max_age_steps: a variant received more steps ago stands in for nothing; None: no bound.
        max_per_source: variants of one source held at once; a plan of K variants an image gains from a pool that holds
            K. None: no bound, and look-ups that slow down as the pool fills.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        max_bytes: int,
        max_reuse: int,
        max_age_steps: int | None = None,
        max_per_source: int | None = MOST_PER_SOURCE,
    ) -> None:
        assert max_per_source is None or max_per_source >= 1, "a source has at least one variant"
        self.refused = 0  # variants not kept because the disk refused
        self._max_bytes, self._max_reuse = max_bytes, max_reuse
        self._max_age, self._max_per_source = max_age_steps, max_per_source
        self._lock = threading.Lock()
        self._shape: tuple[int, ...] = ()
        self._capacity = self._slot_bytes = self._count = self._touched = 0
        self._free: list[int] = []  # slots whose write failed
        self._lost: list[Name] = []
        self._closed = False
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by close()
        except OSError as error:
            raise PoolError(
                f"the pool of received variants cannot be made in {folder or tempfile.gettempdir()} ({error}); "
                "give a folder that can be written"
            ) from None
        self._descriptor = self._file.fileno()

    def check(self, image_bytes: int) -> None:
        """Raises PoolError if `max_bytes` does not hold even one variant of so many bytes."""
        if self._max_bytes < image_bytes:
            raise PoolError(
                f"variants.pool_bytes is {self._max_bytes} but one variant has {image_bytes} bytes; "
                f"raise it to a multiple of that, at least {image_bytes}"
            )

    def add_many(self, names: Sequence[Name], images: Sequence[UInt8Array], step: int) -> None:
        """Keeps variants uint8 [3, h, w] by (source id, index), received at training step `step`.

        One that is held already becomes the newest; its uses stay counted. Raises PoolError if not even one has room.
        """
        for (source_id, index), image in zip(names, images, strict=True):
            with self._lock:  # one at a time, so that the training thread never waits for a whole batch
                if not self._closed:
                    self._add(source_id, index, image, step)

    def choose(self, source_id: bytes, wanted_index: int, step: int) -> tuple[int, UInt8Array] | None:
        """Returns (index, image) to show in place of a variant that is late, or None, and counts the use.

        The wanted variant itself if it is held: it stands in for nothing, so it counts as a regular use and no bound
        applies. Else the least used variant of the source within `max_reuse` and `max_age_steps`; of equally used ones
        the longest held, then the lowest index.
        """
        with self._lock:
            best, best_rank, exact = NONE, (0, 0, 0), False
            for slot in self._chain(source_id):
                index, received = self._index[slot], self._step[slot]
                if index == wanted_index:
                    best, exact = slot, True
                    break
                reuses = self._uses[slot]
                if reuses >= self._max_reuse or (self._max_age is not None and step - received > self._max_age):
                    continue
                rank = (reuses + (self._marks[slot] & FRESH), received, index)
                if best == NONE or rank < best_rank:
                    best, best_rank = slot, rank
            if best == NONE:
                return None
            image = np.empty(self._shape, np.uint8)
            if os.preadv(self._descriptor, [image.data.cast("B")], (best - 1) * self._slot_bytes) != image.nbytes:
                self._drop(best)  # only a file that was cut short by someone else
                self._free.append(best)
                return None
            if exact:
                self._marks[best] |= FRESH
            else:
                self._uses[best] += 1
            return self._index[best], image

    def holds(self, source_id: bytes, index: int) -> bool:
        """Says whether variant `index` of a source is held now."""
        with self._lock:
            return self._find(source_id, index) != NONE

    def keep(self, names: Sequence[Name]) -> list[bool]:
        """Says of each variant whether it is held, and makes those that are the newest, so that coming steps find them.

        The step of their receipt, which `max_age_steps` counts from, stays. Those dropped all the same are in `lost`.
        """
        with self._lock:
            slots = [self._find(*name) for name in names]
            for slot in slots:
                if slot != NONE:
                    self._renew(slot)
                    self._marks[slot] |= KEPT
            return [slot != NONE for slot in slots]

    def lost(self) -> list[Name]:
        """Returns what was once kept and has been dropped since the last call."""
        with self._lock:
            lost, self._lost = self._lost, []
            return lost

    def used_fresh(self, source_id: bytes, index: int) -> None:
        """Marks the use of a variant where it was planned, if it is held; later choices prefer less used ones."""
        with self._lock:
            slot = self._find(source_id, index)
            if slot != NONE:
                self._marks[slot] |= FRESH

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Frees the file; what is added later is dropped, and nothing is found any more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._count, self._capacity = 0, 0
                self._file.close()

    def _allocate(self, image: UInt8Array) -> None:
        self.check(image.nbytes)
        self._shape, self._slot_bytes = image.shape, image.nbytes
        self._capacity = min(self._max_bytes // image.nbytes, 2**31 - 2)
        self._buckets = 1 << self._capacity.bit_length()
        self._arrays: list[Any] = []

        # Memory views, whose single elements are several times faster to reach than those of numpy arrays.
        def column(code: str, count: int = self._capacity + 1) -> Any:
            self._arrays.append(np.zeros(count, code))
            return memoryview(self._arrays[-1])

        self._heads = column("I", self._buckets)  # bucket -> first slot of its chain
        self._next = column("I")
        self._older, self._newer = column("I"), column("I")  # order of receipt; slot 0 is both ends
        self._source_low, self._source_high = column("Q"), column("Q")
        self._index, self._step = column("Q"), column("q")
        self._uses, self._marks = column("I"), column("B")

    def _add(self, source_id: bytes, index: int, image: UInt8Array, step: int) -> None:
        if not self._shape:
            self._allocate(image)
        assert image.shape == self._shape, "all variants of a run have one size"
        slot = self._find(source_id, index)
        if slot != NONE:
            self._step[slot] = step
            self._renew(slot)
            return
        slot = self._slot_for(source_id)
        try:
            pixels = np.ascontiguousarray(image).data.cast("B")
            written = os.pwrite(self._descriptor, pixels, (slot - 1) * self._slot_bytes)
            if written != len(pixels):
                raise OSError(f"only {written} of {len(pixels)} bytes could be written")
        except OSError as error:
            self._free.append(slot)
            self.refused += 1
            if self.refused == 1:
                log.warning("the pool of received variants does not grow any more: %s", error)
            return
        low, high = _words(source_id)
        self._source_low[slot], self._source_high[slot] = low, high
        self._index[slot], self._step[slot] = index, step
        self._uses[slot] = self._marks[slot] = 0
        self._link(slot)
        self._count += 1

    def _slot_for(self, source_id: bytes) -> int:
        """Returns a slot to write to: a free one, or that of the oldest entry, of the source if it has too many."""
        oldest = NONE
        if self._max_per_source is not None:
            held = list(self._chain(source_id))
            if len(held) >= self._max_per_source:
                oldest = held[-1]
        if oldest == NONE and self._free:
            return self._free.pop()
        if oldest == NONE and self._touched < self._capacity:
            self._touched += 1
            return self._touched
        if oldest == NONE:
            oldest = self._newer[0]
        if self._marks[oldest] & KEPT:
            source = self._source_low[oldest].to_bytes(8, "little") + self._source_high[oldest].to_bytes(8, "little")
            self._lost.append((source, self._index[oldest]))
        self._drop(oldest)
        return oldest

    def _chain(self, source_id: bytes) -> list[int]:
        """Returns the slots of a source, the newest first."""
        if not self._capacity:
            return []
        low, high = _words(source_id)
        slots = []
        slot = self._heads[low & (self._buckets - 1)]
        while slot != NONE:
            if self._source_low[slot] == low and self._source_high[slot] == high:
                slots.append(slot)
            slot = self._next[slot]
        return slots

    def _find(self, source_id: bytes, index: int) -> int:
        return next((slot for slot in self._chain(source_id) if self._index[slot] == index), NONE)

    def _drop(self, slot: int) -> None:
        self._unlink(slot)
        self._count -= 1

    def _renew(self, slot: int) -> None:
        self._unlink(slot)
        self._link(slot)

    def _link(self, slot: int) -> None:
        """Makes an entry the newest of its chain and of all."""
        bucket = self._source_low[slot] & (self._buckets - 1)
        self._next[slot], self._heads[bucket] = self._heads[bucket], slot
        last = self._older[0]
        self._older[slot], self._newer[slot] = last, 0
        self._newer[last] = self._older[0] = slot

    def _unlink(self, slot: int) -> None:
        bucket = self._source_low[slot] & (self._buckets - 1)
        before = self._heads[bucket]
        if before == slot:
            self._heads[bucket] = self._next[slot]
        else:
            while self._next[before] != slot:
                before = self._next[before]
            self._next[before] = self._next[slot]
        older, newer = self._older[slot], self._newer[slot]
        self._newer[older], self._older[newer] = newer, older


def _words(source_id: bytes) -> tuple[int, int]:
    return int.from_bytes(source_id[:8], "little"), int.from_bytes(source_id[8:], "little")
