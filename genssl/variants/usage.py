"""How often each of very many variants was used: exact, in 12 bytes a variant, or in one bit of a known plan.

A set or a dictionary of Python numbers takes 80 bytes and more each, which is 10 GB for 100 epochs of ImageNet.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from genssl.errors import UserError

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


FRESH_LIMIT = 2**32  # of the indices of a run's plan, counted from its first

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


class PlannedUsage:
    """Counts distinct variants of a plan, and how often each stood in for another.

    Takes the plan's rows, its `per_image`, its first index, and how many fresh indices it gives an image in an epoch.

    Attributes:
        forgets: whether `state` leaves out all but the counts of what cannot come again; not where variants of passed
            epochs can, as in the replay of a log.
    """

    def __init__(
        self, num_sources: int, per_image: Literal["fresh"] | int, *, first: int = 0, columns: int = 1
    ) -> None:
        self._rows, self._first, self._columns = num_sources, first, columns
        self._limit = None if per_image == "fresh" else per_image
        self.forgets = self._limit is None
        self._used: dict[int, Bytes] = {}  # by index, counted from `first`: one bit a row, as np.packbits has them
        self._stood_in = VariantUsage()  # names are index * rows + row: stand-ins are few
        self._seen = np.zeros(num_sources, bool)
        self._sources = np.zeros(num_sources, np.uint64)  # of each row, from its source id; 0: not known
        # Whether a row may be the equal of one that was seen before a restart, and not since.
        self._restored = self._unsettled = False
        self._newest = 0  # index that was used in its own place
        self._left_out = (0, 0, 0)  # of states restored: distinct, stand-ins, and how often the most used stood in

    def add(self, source_id: bytes, index: int, stands_in: bool, row: int) -> None:
        """Counts one use of a variant of the plan, in its own place or in another's.

        Raises UserError if the plan has no such index, as only a log that was changed by hand says.
        """
        number = index - self._first
        if not 0 <= number < (self._limit or FRESH_LIMIT):
            raise UserError(f"variant {index} of an image is not in this run's plan; its assignment log is damaged")
        self._sources[row] = _name(source_id)
        if not self._seen[row]:
            self._seen[row] = True
            self._unsettled |= self._restored
        if number not in self._used:
            self._used[number] = np.zeros(-(-self._rows // 8), np.uint8)
        self._used[number][row >> 3] |= 128 >> (row & 7)
        if stands_in:
            self._stood_in.add_name(number * self._rows + row, stands_in=True)
        else:
            self._newest = max(self._newest, number)

    @property
    def distinct(self) -> int:
        """How many variants were used."""
        return self._left_out[0] + self._count(list(self._used))

    @property
    def stand_ins(self) -> int:
        """How many variants stood in for others."""
        return self._left_out[1] + len(self._counts_of_stand_ins()[1])

    @property
    def most_stand_ins(self) -> int:
        """How often the one that did so most often stood in for others; 0 if none did."""
        return max(self._left_out[2], int(self._counts_of_stand_ins()[1].max(initial=0)))

    def settle(self, source_id: Callable[[int], bytes]) -> None:
        """Makes the counts exact where a restart before the end of the first epoch has left equal rows unknown.

        `source_id` is called with rows that were seen before such a restart and not since; none as a rule.
        """
        for row in self._unknown().tolist() if self._unsettled else []:
            self._sources[row] = _name(source_id(row))
        self._unsettled = False

    def state(self) -> dict[str, Any]:
        """Returns plain numbers and uint8 arrays, for `restore`."""
        start = self._start()
        kept = sorted(number for number in self._used if number >= start)
        names, counts = self._stood_in.state()
        stood_in = np.zeros(len(kept) * self._rows, bool)
        place = {number: place for place, number in enumerate(kept)}
        coming = names >= np.uint64(start * self._rows)
        numbers, rows = np.divmod(names[coming].astype(np.int64), self._rows)
        stood_in[np.array([place[number] for number in numbers.tolist()], np.int64) * self._rows + rows] = True
        merged_names, merged = self._counts_of_stand_ins()
        passed = merged[merged_names < start * self._rows]
        equal, _ = self._equal_rows()
        return {
            "left_out": [
                self.distinct - self._count(kept),
                self._left_out[1] + len(passed),
                max(self._left_out[2], int(passed.max(initial=0))),
            ],
            "newest": self._newest,
            "unsettled": self._unsettled,
            "indices": kept,
            "used": _packed(np.concatenate([self._used[number] for number in kept] or [np.zeros(0, np.uint8)])),
            "stood_in": _packed(np.packbits(stood_in)),
            "times": _packed(counts[coming].astype("<u4").view(np.uint8).reshape(-1, 4).T),  # three parts are zeros
            "seen": _packed(np.packbits(self._seen)),
            "equal_rows": _packed(equal.astype("<i8").view(np.uint8)),
            "equal_sources": _packed(self._sources[equal].astype("<u8").view(np.uint8)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state` returned, in this process or another."""
        kept = state["indices"]
        used = _unpacked(state["used"]).reshape(len(kept), -(-self._rows // 8))
        self._used = {number: bits.copy() for number, bits in zip(kept, used, strict=True)}
        where = np.flatnonzero(np.unpackbits(_unpacked(state["stood_in"]), count=len(kept) * self._rows))
        places, rows = np.divmod(where, self._rows)
        names = np.array(kept, np.int64)[places] * self._rows + rows
        times = np.ascontiguousarray(_unpacked(state["times"]).reshape(4, -1).T).view("<u4").reshape(-1)
        self._stood_in.restore(names.astype(np.uint64), times.astype(np.uint32))
        self._seen[:] = np.unpackbits(_unpacked(state["seen"]), count=self._rows)
        self._restored, self._unsettled = True, state["unsettled"]
        self._sources[:] = 0
        equal = _unpacked(state["equal_rows"]).view("<i8")
        self._sources[equal] = _unpacked(state["equal_sources"]).view("<u8")
        self._newest, self._left_out = state["newest"], tuple(state["left_out"])

    def _start(self) -> int:
        """Returns the first index that a state holds; what comes before it is counted, and cannot come again."""
        if not self.forgets:
            return 0
        start = self._newest // self._columns * self._columns
        unknown = self._unknown()
        self._unsettled &= len(unknown) > 0
        if self._unsettled:  # equal rows may yet be found in what is held
            start = min([start, *self._used]) // self._columns * self._columns
        return start

    def _unknown(self) -> Rows:
        return np.flatnonzero(self._seen & (self._sources == 0))

    def _count(self, numbers: list[int]) -> int:
        """Returns how many variants of so many indices were used, those of equal images counted once."""
        rows, group = self._equal_rows()
        count = 0
        for number in numbers:
            bits = self._used[number]
            count += int(np.bitwise_count(bits).sum())
            if len(rows):
                of_group = np.bincount(group, bits[rows >> 3] >> (7 - (rows & 7)) & 1)
                count -= int(np.maximum(of_group - 1, 0).sum())
        return count

    def _counts_of_stand_ins(self) -> tuple[Rows, Rows]:
        """Returns names and counts of what stood in, those of equal images added up under the first of them."""
        names, counts = self._stood_in.state()
        numbers, rows = np.divmod(names.astype(np.int64), self._rows)
        equal, group = self._equal_rows()
        if len(equal):
            first = np.arange(self._rows)
            first[equal] = equal[np.unique(group, return_index=True)[1]][group]
            rows = first[rows]
        merged, places = np.unique(numbers * self._rows + rows, return_inverse=True)
        return merged, np.bincount(places, counts, len(merged)).astype(np.int64)

    def _equal_rows(self) -> tuple[Rows, Rows]:
        """Returns the rows whose image another row has too, and the number of the group of equal ones of each."""
        seen = np.flatnonzero(self._sources)
        _, group, sizes = np.unique(self._sources[seen], return_inverse=True, return_counts=True)
        shared = sizes[group] > 1
        return seen[shared], np.unique(group[shared], return_inverse=True)[1]


def _name(source_id: bytes) -> int:
    # Of a number, since the hash of bytes is another in every process; below 2**61, and not 0.
    return hash(int.from_bytes(source_id)) + 1


def _packed(data: Bytes) -> Bytes:
    return np.frombuffer(zlib.compress(data.tobytes()), np.uint8)


def _unpacked(data: Bytes) -> Bytes:
    return np.frombuffer(zlib.decompress(data.tobytes()), np.uint8)
