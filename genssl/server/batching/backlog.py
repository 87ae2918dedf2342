"""How many rows of each batch key wait in each class, and how long the device will take for them.

Clients choose parameters and with them batch keys, of which as many may wait as there are rows. So the seconds are kept
as running sums: a key is priced when its rows change, by whoever changed them, and to ask for a request looks at that
request's keys alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from math import ceil

BatchKey = Hashable
Price = Callable[[BatchKey, int], float]  # the seconds that so many rows of a key take
REFRESHED = 32  # keys priced anew at each question, since what they cost is learnt meanwhile


class _Key:
    """The rows of one batch key by class, and the seconds of those in a class and all better ones."""

    __slots__ = ("rows", "seconds")

    def __init__(self, classes: int) -> None:
        self.rows, self.seconds = [0] * classes, [0.0] * classes


class Backlog:
    """Rows and seconds that wait. Belongs to one thread, or is guarded by a lock.

    Args:
        classes: how many there are; they are numbered from 1, the best, on.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        self._keys: OrderedDict[BatchKey, _Key] = OrderedDict()  # the one priced longest ago first
        self._changed: dict[BatchKey, None] = {}
        self._seconds = [0.0] * classes

    def count(self, key: BatchKey, priority: int, rows: int) -> None:
        """Enters that so many rows of a key have come into a class, or, below 0, have left it."""
        entry = self._keys.get(key)
        if entry is None:
            entry = self._keys[key] = _Key(self._classes)
        entry.rows[priority - 1] += rows
        if any(entry.rows):
            self._changed[key] = None
            return
        self._set(entry, [0.0] * self._classes)
        del self._keys[key]
        self._changed.pop(key, None)
        if not self._keys:
            self._seconds = [0.0] * self._classes  # without what rounding has left

    def waiting(self, key: BatchKey) -> int:
        """Returns how many rows of a key wait."""
        entry = self._keys.get(key)
        return sum(entry.rows) if entry is not None else 0

    def settle(self, price: Price) -> None:
        """Prices the keys whose rows have changed; to be called by whoever changed them."""
        for key in self._changed:
            self._price(key, price)
        self._changed.clear()

    def seconds(self, rows: Mapping[BatchKey, int], priority: int, part: float, price: Price) -> float:
        """Returns how long what goes before some new rows takes, and they themselves.

        All that waits in better classes goes before them, and a part of what waits in their own; those of the same key
        share batches with them.
        """
        for _ in range(min(REFRESHED, len(self._keys))):
            self._price(next(iter(self._keys)), price)
        seconds = _before(self._seconds, priority, part)
        for key, new in rows.items():
            entry = self._keys.get(key)
            if entry is not None:
                seconds -= _before(entry.seconds, priority, part)
                new += sum(entry.rows[: priority - 1]) + ceil(part * entry.rows[priority - 1] - 1e-9)
            seconds += price(key, new)
        return max(0.0, seconds)

    def _price(self, key: BatchKey, price: Price) -> None:
        entry, rows = self._keys[key], 0
        seconds: list[float] = []
        for more in entry.rows:
            rows += more
            seconds.append(price(key, rows) if more else seconds[-1] if seconds else 0.0)
        self._set(entry, seconds)
        self._keys.move_to_end(key)

    def _set(self, entry: _Key, seconds: list[float]) -> None:
        self._seconds = [
            all_keys + new - old for all_keys, new, old in zip(self._seconds, seconds, entry.seconds, strict=True)
        ]
        entry.seconds = seconds


def _before(seconds: list[float], priority: int, part: float) -> float:
    """Returns of seconds by class, each with the better ones, those of the better ones and of a part of this one."""
    better = seconds[priority - 2] if priority > 1 else 0.0
    return better + part * (seconds[priority - 1] - better)
