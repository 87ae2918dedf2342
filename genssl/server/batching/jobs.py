"""What the batcher takes in, hands out and reports, and the records it keeps meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from operator import itemgetter
from typing import Literal

import numpy as np

from genssl.data.base import UInt8Array
from genssl.server.batching.schedule import Priority, Submitter, Waiting
from genssl.variants.engine import Row

ANYBODY = Submitter()
DropReason = Literal["cancelled", "deadline"]


class GenerationFailedError(Exception):
    """The generator raised while it computed a row or embedded a source; the reason is in the server's log."""


class DeadlinePassedError(Exception):
    """The deadline passed before the row was finished."""


@dataclass(slots=True, eq=False)
class Caller:
    """Who makes a call, and until when.

    Attributes:
        deadline: instant of the event loop's clock at which unfinished rows are given up; None: never.
    """

    submitter: Submitter = ANYBODY  # whose turns the call's rows and sources take
    deadline: float | None = None
    spent: int = 0  # how many rows of the call were made, or were on the device when the call gave them up


@dataclass(frozen=True, slots=True)
class MadeImage:
    """A variant uint8 [3, h, w].

    Attributes:
        image: the pixels, read-only; all who asked for the row share them, and nothing
            else of the batch is held.
    """

    image: UInt8Array
    seconds: float  # its share of the batch's device seconds; 0 if it was shared
    shared: bool = False  # whether it was computed for another submitter, who had asked first
    queue_seconds: float = 0.0  # from its submission to the start of its batch


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What became of a batch.

    Attributes:
        rows: how many rows it answered; none if it is tried again in smaller batches, or
            if nobody wanted it any more.
    """

    bucket: int  # its size with padding
    rows: int
    seconds: float  # on the device
    queue_waits: list[float]  # of the rows answered, seconds from their submission to the start of their (first) batch
    failed: bool  # whether the generator raised


class BatchListener:
    """Is told by a batcher, on its event loop, what happens; this one ignores everything."""

    def batch_done(self, report: BatchReport) -> None:
        """Follows each batch, after its rows were answered."""

    def rows_dropped(self, rows: int, reason: DropReason) -> None:
        """Says that nobody wants so many rows any more."""

    def image_made(self, row: Row, image: UInt8Array) -> None:
        """Hands over each image that was computed, read-only, before it is answered and also if nobody waits for it."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One call of `submit`; `left` counts the rows without a result."""

    caller: Caller
    arrived: float
    answered: asyncio.Future[None]
    results: list[MadeImage | Exception | None]
    left: int
    jobs: list[Job] = field(default_factory=list)


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Waiting):
    """One image to make, and everyone who wants it.

    However many join and leave, either takes a time that does not depend on the others: who has left stays in the queue
    until its turn comes, or until most of them have.
    """

    row: Row  # what to make
    waiters: int = 0  # how many places in the results of tickets wait for it
    begun: float = 0.0  # when it first came to the device; 0 before
    _joined: int = 0
    # By class and then by arrival, a heap: priority, number, ticket, and the place in its results.
    _queue: list[tuple[Priority, int, Ticket, int]] = field(default_factory=list)

    def join(self, ticket: Ticket, place: int) -> None:
        """Lets a place in a ticket's results wait for the image."""
        heappush(self._queue, (ticket.caller.submitter.priority, self._joined, ticket, place))
        self._joined += 1
        self.waiters += 1

    def leave(self) -> None:
        """Notes that a place, which has got its result otherwise, does not wait any more."""
        self.waiters -= 1
        if len(self._queue) > 2 * self.waiters + 8:
            self._queue = self._waiting()
            heapify(self._queue)

    def foremost(self) -> Ticket:
        """Returns the most urgent ticket that waits, of equals the first: the row takes its turn."""
        while self._queue[0][2].results[self._queue[0][3]] is not None:
            heappop(self._queue)
        return self._queue[0][2]

    def answer(self, outcome: UInt8Array | Exception | None, seconds: float) -> list[Ticket]:
        """Gives all waiters the image or the error, and the first one the seconds; returns the tickets now complete."""
        complete = []
        waiters = self._waiting()
        if len(waiters) > 1:
            waiters.sort(key=itemgetter(1))
        for order, (_, _, ticket, place) in enumerate(waiters):
            if isinstance(outcome, np.ndarray):
                wait = max(0.0, self.begun - ticket.arrived)
                ticket.results[place] = MadeImage(outcome, 0.0 if order else seconds, order > 0, wait)
                ticket.caller.spent += 1
            else:
                ticket.results[place] = outcome
            ticket.left -= 1
            if ticket.left == 0:
                complete.append(ticket)
                if not ticket.answered.done():
                    ticket.answered.set_result(None)
        return complete

    def _waiting(self) -> list[tuple[Priority, int, Ticket, int]]:
        return [waiter for waiter in self._queue if waiter[2].results[waiter[3]] is None]


@dataclass(slots=True, eq=False)
class Batch:
    """Jobs with equal batch keys, which share one call of the generator."""

    jobs: list[Job]
    bucket: int  # the size that the batch is padded to; it may shrink while it runs
    retried: bool = False  # whether it is a part of a batch that failed
    started: float = 0.0  # instant at which it came to the device
    lost: set[int] = field(default_factory=set)  # places that the generator was told to leave: anything may be there
    _size: int = 0  # what it has shrunk to

    def __post_init__(self) -> None:
        self._size = self.bucket

    def keep(self, sizes: Sequence[int]) -> list[bool]:
        """Returns which jobs the generator goes on with; for `VariantEngine.generate`, between sampler steps.

        One that nobody waits for is given up only where that saves time, that is if the batch shrinks to one of `sizes`
        or ends: otherwise its image is made all the same, and is worth keeping.
        """
        wanted = [job.waiters > 0 for job in self.jobs]
        living = sum(wanted)
        fitting = [size for size in sizes if living <= size < self._size]
        if fitting or not living:
            self._size = min(fitting, default=0)
            self.lost.update(place for place, wants in enumerate(wanted) if not wants)
        return [place not in self.lost for place in range(len(self.jobs))]

    def split(self, most: int, buckets: Sequence[int]) -> list[Batch]:
        """Returns the parts in which to try again: of at most `most` rows, and none beyond the largest bucket."""
        most = min(most, buckets[-1])  # which may have sunk below the half of this batch since it was cut
        parts = [self.jobs[start : start + most] for start in range(0, len(self.jobs), most)]
        return [Batch(jobs, next(size for size in buckets if size >= len(jobs)), retried=True) for jobs in parts]


@dataclass(slots=True)
class BatchOutcome:
    """Images of a batch's jobs (None for those given up), the error of all of them, or the parts to try again.

    With none of the three, nobody wants the batch any more.
    """

    images: list[UInt8Array | None] | None = None
    error: GenerationFailedError | None = None
    parts: list[Batch] = field(default_factory=list)
