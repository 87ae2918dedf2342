"""How often each of very many variants was used: exact, in about 12 bytes a variant.

A set or a dictionary of Python numbers takes 80 bytes and more each, which is 10 GB for 100 epochs of ImageNet. Where a
view plan says what can be used, `genssl.variants.planned_usage` takes a bit each.
"""

from __future__ import annotations

from array import array
from itertools import pairwise

import numpy as np
import numpy.typing as npt

SHARD_BITS = 8
SHARDS = 1 << SHARD_BITS
PENDING = 1 << 16  # entries that wait to be sorted in, at least
PENDING_PART = 32  # at most this part of what is sorted: each entry is then copied about 32 times in a run
MASK = (1 << 64) - 1
_FIRSTS = np.arange(1, SHARDS, dtype=np.uint64) << np.uint64(64 - SHARD_BITS)  # the least name of each shard but one


class VariantUsage:
    """Counts distinct variants, and how often each stood in for another.

    Variants go by 64-bit hashes of their names: among the 128 million of 100 epochs of ImageNet, two share one with a
    probability of 1 in 2000. The hashes lie sorted in 256 shards, so that what is new is merged into one small array
    after the other and no second copy of everything is made.
    """

    def __init__(self) -> None:
        self._names: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64) for _ in range(SHARDS)]
        self._stood_in: list[npt.NDArray[np.uint32]] = [np.empty(0, np.uint32) for _ in range(SHARDS)]
        self._sorted = 0
        self._new_names, self._new_stand_ins = array("Q"), array("B")

    def add(self, source_id: bytes, index: int, stands_in: bool) -> None:
        """Counts one use of a variant, in its own place or in another's."""
        # Of numbers, since the hash of bytes is another in every process, and a run may go on in a later one.
        self.add_name(hash((int.from_bytes(source_id), index)) & MASK, stands_in)

    def add_name(self, name: int, stands_in: bool) -> None:
        """Counts one use of a variant that goes by a number below 2**64."""
        self._new_names.append(name)
        self._new_stand_ins.append(stands_in)
        if len(self._new_names) >= max(PENDING, self._sorted // PENDING_PART):
            self._merge()

    @property
    def distinct(self) -> int:
        """How many variants were used."""
        self._merge()
        return self._sorted

    @property
    def stand_ins(self) -> int:
        """How many variants stood in for others."""
        self._merge()
        return sum(int(np.count_nonzero(counts)) for counts in self._stood_in)

    @property
    def most_stand_ins(self) -> int:
        """How often the one that did so most often stood in for others; 0 if none did."""
        self._merge()
        return max(int(counts.max(initial=0)) for counts in self._stood_in)

    def state(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Returns names uint64 [N] and how often each stood in uint32 [N], for `restore`."""
        self._merge()
        return np.concatenate(self._names), np.concatenate(self._stood_in)

    def restore(self, names: npt.NDArray[np.uint64], stood_in: npt.NDArray[np.uint32]) -> None:
        """Replaces everything by what `state` returned, in this process or another."""
        bounds = np.searchsorted(names, _FIRSTS)
        self._names, self._stood_in = np.split(names.copy(), bounds), np.split(stood_in.copy(), bounds)
        self._sorted = len(names)
        self._new_names, self._new_stand_ins = array("Q"), array("B")

    def _merge(self) -> None:
        """Sorts in what was added."""
        if not self._new_names:
            return
        # Copies: an array cannot grow while numpy looks into it.
        names, places = np.unique(np.array(self._new_names, np.uint64), return_inverse=True)
        stood_in = np.bincount(places[np.array(self._new_stand_ins, bool)], minlength=len(names)).astype(np.uint32)
        self._new_names, self._new_stand_ins = array("Q"), array("B")
        bounds = [0, *np.searchsorted(names, _FIRSTS).tolist(), len(names)]
        for shard, (start, end) in enumerate(pairwise(bounds)):
            if start < end:
                self._merge_shard(shard, names[start:end], stood_in[start:end])

    def _merge_shard(self, shard: int, names: npt.NDArray[np.uint64], stood_in: npt.NDArray[np.uint32]) -> None:
        known, counts = self._names[shard], self._stood_in[shard]
        places = np.searchsorted(known, names)
        is_new = np.ones(len(names), bool)
        inside = places < len(known)
        is_new[inside] = known[places[inside]] != names[inside]
        counts[places[~is_new]] += stood_in[~is_new]  # the names are distinct, so no place comes twice
        self._names[shard] = np.insert(known, places[is_new], names[is_new])
        self._stood_in[shard] = np.insert(counts, places[is_new], stood_in[is_new])
        self._sorted += int(is_new.sum())
