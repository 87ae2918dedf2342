"""The waiting rows of one generator, and which of them go next.

Three classes, the better one first. Within a class the clients take turns, a row each: every row counts the same, so
this is deficit round robin (Shreedhar and Varghese 1996) with nothing to carry over. Within a client, first come, first
served. A row that has waited long rises by one class, so that no class starves another for good.

Every operation takes constant time, except choosing a batch key, which looks at the keys of one class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum
from itertools import count
from math import ceil
from typing import Generic, TypeVar

BatchKey = Hashable
RISING_AT_ONCE = 256  # rows that rise in one call; thousands that came together must not hold up a batch


class Priority(IntEnum):
    """The class of a row; the numbers are those of the wire."""

    INTERACTIVE = 1
    TRAINING = 2
    BULK = 3


@dataclass(slots=True, eq=False)
class Waiting:
    """A row in the schedule.

    Attributes:
        key: rows with equal keys can share a batch.
        client: whose turn it takes.
        priority: the class asked for.
        lane: the class it waits in, which ageing lowers; None while it is not in a schedule.
        since: when it came into that class, in seconds.
        number: its place among all rows that came into any class.
    """

    key: BatchKey
    client: str
    priority: Priority
    lane: Priority | None = None
    since: float = 0.0
    number: int = 0


Job = TypeVar("Job", bound=Waiting)


class _Lane(Generic[Job]):
    """The rows of one class."""

    def __init__(self) -> None:
        # Ordered dicts are queues that also give up any member at once, as a client that goes away needs.
        self.rings: dict[BatchKey, OrderedDict[str, OrderedDict[Job, None]]] = {}
        self.rows_by_key: dict[BatchKey, int] = {}
        self.turns: OrderedDict[str, int] = OrderedDict()  # clients, the next one first, and how many rows they have
        self.arrivals: OrderedDict[Job, None] = OrderedDict()

    def add(self, job: Job) -> None:
        ring = self.rings.get(job.key)
        if ring is None:
            ring = self.rings[job.key] = OrderedDict()
        rows = ring.get(job.client)
        if rows is None:
            rows = ring[job.client] = OrderedDict()
        rows[job] = None
        self.arrivals[job] = None
        self.rows_by_key[job.key] = self.rows_by_key.get(job.key, 0) + 1
        self.turns[job.client] = self.turns.get(job.client, 0) + 1

    def remove(self, job: Job) -> None:
        ring = self.rings[job.key]
        rows = ring[job.client]
        del rows[job], self.arrivals[job]
        if not rows:
            del ring[job.client]
        self.rows_by_key[job.key] -= 1
        if not ring:
            del self.rings[job.key], self.rows_by_key[job.key]
        self.turns[job.client] -= 1
        if not self.turns[job.client]:
            del self.turns[job.client]

    def take(self, key: BatchKey, most: int) -> list[Job]:
        taken: list[Job] = []
        while len(taken) < most and (ring := self.rings.get(key)):
            client, rows = next(iter(ring.items()))
            job = next(iter(rows))
            ring.move_to_end(client)
            self.remove(job)
            taken.append(job)
        return taken


class Schedule(Generic[Job]):
    """What waits, in the order in which it goes. Belongs to one thread, or is guarded by a lock.

    Args:
        ageing_seconds: a row that has waited so long rises by one class, and again after each further such time.
    """

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds
        self._lanes: dict[Priority, _Lane[Job]] = {priority: _Lane() for priority in Priority}
        self._by_priority = dict.fromkeys(Priority, 0)
        self._length = 0
        self._numbers = count()

    def __len__(self) -> int:
        return self._length

    def add(self, job: Job, now: float) -> None:
        """Puts a row behind its client's others of its class; `now` in seconds."""
        self._enter(job, job.priority, now)
        self._by_priority[job.priority] += 1
        self._length += 1

    def discard(self, job: Job) -> None:
        """Takes a waiting row out."""
        assert job.lane is not None, "the row waits"
        self._lanes[job.lane].remove(job)
        self._left(job)

    def next_key(self, now: float) -> BatchKey | None:
        """Returns the batch key of the row whose turn it is, or None if nothing waits; `now` in seconds."""
        self._age(now)
        for lane in self._lanes.values():
            if lane.turns:
                client = next(iter(lane.turns))
                lane.turns.move_to_end(client)
                rows = [next(iter(ring[client])) for ring in lane.rings.values() if client in ring]
                key = min(rows, key=lambda row: row.number).key
                lane.rings[key].move_to_end(client, last=False)
                return key
        return None

    def waiting(self, key: BatchKey) -> int:
        """Returns how many rows of a batch key wait."""
        return sum(lane.rows_by_key.get(key, 0) for lane in self._lanes.values())

    def take(self, key: BatchKey, most: int) -> list[Job]:
        """Takes out up to `most` rows of a batch key, in order; rows of lower classes rather than padding."""
        taken: list[Job] = []
        for lane in self._lanes.values():
            taken += lane.take(key, most - len(taken))
        for job in taken:
            self._left(job)
        return taken

    def by_priority(self) -> dict[str, int]:
        """Returns how many rows wait by the class that they asked for, in lower case."""
        return {priority.name.lower(): rows for priority, rows in self._by_priority.items()}

    def rows_of(self, client: str) -> int:
        """Returns how many rows of a client wait."""
        return sum(lane.turns.get(client, 0) for lane in self._lanes.values())

    def ahead(self, rows: int, priority: Priority, client: str | None) -> dict[BatchKey, int]:
        """Returns how many rows of each key would go before the last of `rows` new ones.

        Args:
            rows: how many would be added.
            priority: their class.
            client: whose they are. In a class, every other client gets as many turns as this one until its last row
                goes; without a client, all that waits in the class goes first.
        """
        found: dict[BatchKey, int] = {}
        for lane_priority, lane in self._lanes.items():
            share = 1.0
            if lane_priority > priority:
                break
            if lane_priority == priority and client is not None and lane.turns:
                turns = lane.turns.get(client, 0) + rows
                share = sum(min(held, turns) for held in lane.turns.values()) / sum(lane.turns.values())
            for key, held in lane.rows_by_key.items():
                found[key] = found.get(key, 0) + ceil(held * share)
        return found

    def _enter(self, job: Job, lane: Priority, now: float) -> None:
        job.lane, job.since, job.number = lane, now, next(self._numbers)
        self._lanes[lane].add(job)

    def _left(self, job: Job) -> None:
        job.lane = None
        self._by_priority[job.priority] -= 1
        self._length -= 1

    def _age(self, now: float) -> None:
        for lane in (Priority.TRAINING, Priority.BULK):
            arrivals = self._lanes[lane].arrivals
            for _ in range(RISING_AT_ONCE):
                job = next(iter(arrivals), None)
                if job is None or job.since + self._ageing_seconds > now:
                    break
                self._lanes[lane].remove(job)
                self._enter(job, Priority(lane - 1), now)
