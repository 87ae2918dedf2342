"""The waiting rows of one generator, and which of them go next.

Three classes, the better one first. Within a class the holders (of tokens; see `auth.holder_of`) take turns, within a
holder the clients that it names, a row each, and within a client it is first come, first served: whoever calls itself
by many names shares one holder's turns among them. Every row of a batch counts the same there, so this is deficit round
robin (Shreedhar and Varghese 1996) with nothing to carry over. Batches do not cost the same: the next one is for the
holder that has had the least of the device so far (start-time fair queueing, Goyal et al. 1996).

When a class has waited long, its rows rise by one class, so that no class starves another for good: those whose turn it
is, and not the oldest, and a batch of them at a time, so that a flood that has waited does not come before all that
others ask for meanwhile.

Every operation takes constant time for a row, except choosing a batch key, which looks at the holders of one class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from genssl.server.batching.backlog import Backlog
from genssl.server.batching.turns import FairUsage

BatchKey = Hashable
RISEN = 64  # rows that wait at a time in a class to which they have risen, about a batch


class Priority(IntEnum):
    """The class of a row; the numbers are those of the wire."""

    INTERACTIVE = 1
    TRAINING = 2
    BULK = 3


@dataclass(frozen=True, slots=True)
class Submitter:
    """Who asks, and how urgently: `client` takes turns with the others of its `holder`, holders share the device."""

    client: str = ""
    priority: Priority = Priority.TRAINING
    holder: str = ""


@dataclass(slots=True, eq=False)
class Waiting:
    """A row in the schedule."""

    key: BatchKey  # rows with equal keys can share a batch
    submitter: Submitter  # whose turn it takes, and the class asked for
    lane: Priority | None = None  # the class it waits in, which ageing lowers; None while it is not in a schedule
    since: float = 0.0  # when it came into that class, in seconds


Job = TypeVar("Job", bound=Waiting)


class _Sizes:
    """How long the queues of several are, by powers of two: enough to say how many rows so many turns of each take."""

    __slots__ = ("_queues", "_rows")

    def __init__(self) -> None:
        self._queues, self._rows = [0] * 40, [0] * 40  # a queue of n rows stands at n's number of binary digits

    def changed(self, before: int, after: int) -> None:
        """Enters that a queue of `before` rows has `after` now; one of 0 rows is none."""
        old, new = before.bit_length(), after.bit_length()
        self._rows[old] -= before
        self._rows[new] += after
        self._queues[old] -= 1
        self._queues[new] += 1

    def rows_within(self, turns: int) -> int:
        """Returns the sum of min(rows, turns) over the queues; more where some of about that length are mixed."""
        digits = turns.bit_length()
        longer = sum(self._queues[digits + 1 :]) * turns
        return sum(self._rows[1:digits]) + min(self._rows[digits], self._queues[digits] * turns) + longer


class _Holder(Generic[Job]):
    """The rows of one holder by client, the next one first."""

    __slots__ = ("clients", "rows", "sizes")

    def __init__(self, sizes: _Sizes | None) -> None:
        # Ordered dicts are queues that also give up any member at once, as a client that goes away needs.
        self.clients: OrderedDict[str, OrderedDict[Job, None]] = OrderedDict()
        self.rows = 0
        self.sizes = sizes


class _Ring(Generic[Job]):
    """Rows in the order in which they go, by holder and client; only a measured one knows `rows_before`."""

    __slots__ = ("holders", "sizes")

    def __init__(self, *, measured: bool) -> None:
        self.holders: OrderedDict[str, _Holder[Job]] = OrderedDict()
        self.sizes = _Sizes() if measured else None

    def add(self, job: Job) -> None:
        who = job.submitter
        holder = self.holders.get(who.holder)
        if holder is None:
            holder = self.holders[who.holder] = _Holder(_Sizes() if self.sizes is not None else None)
        rows = holder.clients.get(who.client)
        if rows is None:
            rows = holder.clients[who.client] = OrderedDict()
        rows[job] = None
        self._count(holder, len(rows), 1)

    def remove(self, job: Job) -> None:
        who = job.submitter
        holder = self.holders[who.holder]
        rows = holder.clients[who.client]
        del rows[job]
        self._count(holder, len(rows), -1)
        if not rows:
            del holder.clients[who.client]
        if not holder.rows:
            del self.holders[who.holder]

    def _count(self, holder: _Holder[Job], rows_of_client: int, change: int) -> None:
        holder.rows += change
        if self.sizes is not None and holder.sizes is not None:
            holder.sizes.changed(rows_of_client - change, rows_of_client)
            self.sizes.changed(holder.rows - change, holder.rows)

    def next_of(self, holder: str) -> Job:
        return next(iter(next(iter(self.holders[holder].clients.values()))))

    def move(self, job: Job, *, last: bool) -> None:
        """Puts a row's holder, and among its clients the row's, behind the others or before them."""
        self.holders.move_to_end(job.submitter.holder, last=last)
        self.holders[job.submitter.holder].clients.move_to_end(job.submitter.client, last=last)

    def take(self) -> Job:
        job = self.next_of(next(iter(self.holders)))
        self.move(job, last=True)
        self.remove(job)
        return job

    def part_before(self, rows: int, who: Submitter) -> float:
        """Returns the part of all rows that go before the last of `rows` new ones; 1 if there are none."""
        assert self.sizes is not None, "the ring is measured"
        own = self.holders.get(who.holder)
        held = own.rows if own is not None else 0
        turns = rows  # of the holder, until then: each of its clients takes as many as this one
        if own is not None and own.sizes is not None:
            turns += own.sizes.rows_within(len(own.clients.get(who.client, ())) + rows)
        whole = self.sizes.rows_within(2**39 - 1)
        before = min(held, turns - rows) + self.sizes.rows_within(turns) - min(held, turns)
        return min(1.0, before / whole) if whole else 1.0


class _Lane(Generic[Job]):
    """The rows of one class: all of them, by batch key, and in the order of their arrival."""

    def __init__(self) -> None:
        self.ring: _Ring[Job] = _Ring(measured=True)
        self.by_key: dict[BatchKey, _Ring[Job]] = {}
        self.arrivals: OrderedDict[Job, None] = OrderedDict()

    def add(self, job: Job) -> None:
        self.ring.add(job)
        ring = self.by_key.get(job.key)
        if ring is None:
            ring = self.by_key[job.key] = _Ring(measured=False)
        ring.add(job)
        self.arrivals[job] = None

    def remove(self, job: Job) -> None:
        self.by_key[job.key].remove(job)
        self._removed(job)

    def take(self, key: BatchKey) -> Job | None:
        ring = self.by_key.get(key)
        if ring is None:
            return None
        job = ring.take()
        self._removed(job)
        return job

    def _removed(self, job: Job) -> None:
        self.ring.remove(job)
        del self.arrivals[job]
        if not self.by_key[job.key].holders:
            del self.by_key[job.key]


class Schedule(Generic[Job]):
    """What waits, in the order in which it goes. Belongs to one thread, or is guarded by a lock.

    Attributes:
        backlog: how many rows of each batch key wait, and how long they take.

    Args:
        ageing_seconds: once a row of a class has waited so long, rows rise by one class, and again after each further
            such time.
    """

    def __init__(self, ageing_seconds: float) -> None:
        self.backlog = Backlog(len(Priority))
        self._ageing_seconds = ageing_seconds
        self._lanes: dict[Priority, _Lane[Job]] = {priority: _Lane() for priority in Priority}
        self._by_priority = dict.fromkeys(Priority, 0)
        self._risen = dict.fromkeys(Priority, 0)
        self._held: dict[str, int] = {}
        self._device_seconds = FairUsage()  # by holder
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, job: Job, now: float) -> None:
        """Puts a row behind its client's others of its class; `now` in seconds."""
        who = job.submitter
        if who.holder not in self._held:
            self._device_seconds.join(who.holder)
            self._held[who.holder] = 0
        self._held[who.holder] += 1
        self._enter(job, who.priority, now)
        self._by_priority[who.priority] += 1
        self._length += 1

    def discard(self, job: Job) -> None:
        """Takes a waiting row out."""
        assert job.lane is not None, "the row waits"
        self._lanes[job.lane].remove(job)
        self._left(job)

    def pass_on(self, job: Job, to: Submitter, now: float) -> None:
        """Puts a waiting row behind the others of another submitter."""
        self.discard(job)
        job.submitter = to
        self.add(job, now)

    def next_key(self, now: float) -> BatchKey | None:
        """Returns the batch key of the row whose turn it is, or None if nothing waits; `now` in seconds."""
        self._age(now)
        if self._held:
            self._device_seconds.advance(min(map(self._device_seconds.of, self._held)))
        for lane in self._lanes.values():
            if lane.ring.holders:
                job = self._next_of(lane)
                lane.by_key[job.key].move(job, last=False)
                return job.key
        self._device_seconds.clear()
        return None

    def charge(self, jobs: Iterable[Job], seconds: float) -> None:
        """Counts `seconds` of the device, for each of some rows that were taken, towards their holders' shares."""
        for job in jobs:
            self._device_seconds.charge(job.submitter.holder, seconds)
        self._device_seconds.forget(self._held)

    def take(self, key: BatchKey, most: int) -> list[Job]:
        """Takes out up to `most` rows of a batch key, in order; rows of lower classes rather than padding."""
        taken: list[Job] = []
        for lane in self._lanes.values():
            while len(taken) < most and (job := lane.take(key)) is not None:
                taken.append(job)
                self._left(job)
        return taken

    def by_priority(self) -> dict[str, int]:
        """Returns how many rows wait by the class that they asked for, in lower case."""
        return {priority.name.lower(): rows for priority, rows in self._by_priority.items()}

    def part_before(self, rows: int, who: Submitter) -> float:
        """Returns the part, 0..1, of the rows of a submitter's class that go before the last of `rows` new ones.

        Until then every other client of the holder gets as many turns as this one, and every other holder as this one.
        """
        return self._lanes[who.priority].ring.part_before(rows, who)

    def _enter(self, job: Job, lane: Priority, now: float) -> None:
        job.lane, job.since = lane, now
        self._lanes[lane].add(job)
        self.backlog.count(job.key, lane, 1)

    def _left(self, job: Job) -> None:
        assert job.lane is not None, "the row waited"
        who = job.submitter
        self.backlog.count(job.key, job.lane, -1)
        self._risen[job.lane] -= job.lane != who.priority
        job.lane = None
        self._by_priority[who.priority] -= 1
        self._length -= 1
        self._held[who.holder] -= 1
        if not self._held[who.holder]:
            del self._held[who.holder]

    def _next_of(self, lane: _Lane[Job]) -> Job:
        """Returns the row of a class whose turn it is, and puts its holder and client behind the others."""
        # Of equals the first in the ring, so that they take turns before anything has been charged.
        job = lane.ring.next_of(min(lane.ring.holders, key=self._device_seconds.of))
        lane.ring.move(job, last=True)
        return job

    def _age(self, now: float) -> None:
        for priority in (Priority.TRAINING, Priority.BULK):
            lane, better = self._lanes[priority], Priority(priority - 1)
            while self._risen[better] < RISEN:
                oldest = next(iter(lane.arrivals), None)
                if oldest is None or oldest.since + self._ageing_seconds > now:
                    break
                job = self._next_of(lane)
                lane.remove(job)
                self.backlog.count(job.key, priority, -1)
                self._risen[priority] -= priority != job.submitter.priority
                self._risen[better] += 1
                self._enter(job, better, now)
