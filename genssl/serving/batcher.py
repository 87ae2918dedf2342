"""Merges the rows of all requests into device batches.

Whatever waits when the device becomes free goes into the next batch: no delay is added, and under load batches are full
by themselves. The device's thread cuts its next batch itself, when it has finished one: as late as can be, and without
waiting for the event loop, which meanwhile answers for the batch before.

Two threads meet here. The event loop owns tickets, waiters and answers; the device's thread reads of them only whether
a job still has waiters. The schedule is touched by both, under a lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from genssl.data.base import UInt8Array
from genssl.generators.base import Cancelled
from genssl.serving.cost import KEYS, CostModel
from genssl.serving.schedule import BatchKey, Priority, Schedule, Waiting
from genssl.variants.engine import Row, VariantEngine

log = logging.getLogger(__name__)

DropReason = Literal["cancelled", "deadline"]


class GenerationFailedError(Exception):
    """The generator raised while it computed a row; the reason is in the server's log."""


class DeadlinePassedError(Exception):
    """The deadline passed before the row was finished."""


@dataclass(frozen=True, slots=True)
class Made:
    """A variant uint8 [3, h, w].

    Attributes:
        image: the pixels.
        seconds: its share of the batch's device seconds; 0 if it was shared.
        shared: whether it was computed for another submitter, who had asked first.
        queue_seconds: from its submission to the start of its batch.
    """

    image: UInt8Array
    seconds: float
    shared: bool = False
    queue_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What became of a batch.

    Attributes:
        bucket: its size with padding.
        rows: how many rows it answered; none if it is tried again in smaller batches, or if nobody wanted it any more.
        seconds: on the device.
        queue_waits: of the rows answered, seconds from their submission to the start of their (first) batch.
        failed: whether the generator raised.
    """

    bucket: int
    rows: int
    seconds: float
    queue_waits: list[float]
    failed: bool


@dataclass(slots=True, eq=False)
class _Ticket:
    """One call of `submit`."""

    client: str
    priority: Priority
    arrived: float
    answered: asyncio.Future[None]
    results: list[Made | BaseException | None]
    left: int
    jobs: list[_Job] = field(default_factory=list)


@dataclass(slots=True, eq=False, kw_only=True)
class _Job(Waiting):
    """One image to make, and everyone who wants it: the ticket, and the place in its results."""

    row: Row
    waiters: list[tuple[_Ticket, int]]
    begun: float = 0.0


@dataclass(slots=True, eq=False)
class _Batch:
    jobs: list[_Job]
    bucket: int
    started: float = 0.0

    def alive(self) -> list[bool]:
        return [bool(job.waiters) for job in self.jobs]


class Batcher:
    """One generator's queue. Lives on one event loop; several may share a device.

    Args:
        engine: computes batches.
        device: an executor with one thread, the one that owns the device.
        ageing_seconds: a waiting row rises by one class each time this has passed.
        on_batch: called on the event loop after each batch.
        on_drop: called on the event loop with a number of rows that nobody wants any more, and why.
    """

    def __init__(
        self,
        engine: VariantEngine,
        device: Executor,
        *,
        ageing_seconds: float = 10.0,
        on_batch: Callable[[BatchReport], None] | None = None,
        on_drop: Callable[[int, DropReason], None] | None = None,
    ) -> None:
        self._engine, self._device = engine, device
        self._on_batch, self._on_drop = on_batch, on_drop
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._tickets: set[_Ticket] = set()
        self._flights: dict[bytes, _Job] = {}  # what waits or runs, by the name of its row
        self._unanswered = 0
        self._idle = asyncio.Event()
        self._idle.set()

        self._lock = threading.Lock()
        self._schedule: Schedule[_Job] = Schedule(ageing_seconds)
        self._cost = CostModel()
        self._awake = False  # whether the device's thread is running a batch, or is about to look for one
        self._current: _Batch | None = None
        self._again: deque[_Batch] = deque()  # parts of batches that failed
        self._limits: OrderedDict[BatchKey, int] = OrderedDict()  # largest bucket where memory ran out before

    @property
    def cost(self) -> CostModel:
        """What batches cost; give it the warm-up's batches before the first row is submitted."""
        return self._cost

    @property
    def queued(self) -> int:
        """Rows that wait for the device; a row that several wait for counts once."""
        return len(self._schedule)

    @property
    def running(self) -> int:
        """Rows on the device, or on their way back from it."""
        return self._unanswered - len(self._schedule)

    @property
    def largest_bucket(self) -> int:
        """The largest batch in use, less than the engine's after the device ran out of memory (on any batch key)."""
        return min(self._limits.values(), default=self._engine.buckets[-1])

    def queued_by_priority(self) -> dict[str, int]:
        """Returns how many rows wait by class, in lower case; ageing does not count."""
        return self._schedule.by_priority()

    def queued_of(self, client: str) -> int:
        """Returns how many rows wait in a client's turn; a shared row waits in its most urgent submitter's."""
        return self._schedule.rows_of(client)

    def predicted_wait(
        self,
        rows: int,
        priority: Priority = Priority.TRAINING,
        *,
        client: str | None = None,
        key: BatchKey | None = None,
    ) -> float | None:
        """Returns the seconds until `rows` new rows would be finished; None before any batch has been observed.

        Counts the batch that runs, what waits in better classes and what goes before them in their own. What other
        generators on the device hold up is not counted, nor are rows still to come.

        Args:
            rows: how many would be submitted.
            priority: their class.
            client: whose they are; without it, all that waits in the class counts as being ahead.
            key: their batch key; by default the one that ran last.
        """
        with self._lock:
            ahead = self._schedule.ahead(rows, priority, client)
            key = self._cost.latest_key if key is None else key
            ahead[key] = ahead.get(key, 0) + rows
            seconds = [self._cost.predict(key, count, self._buckets(key)) for key, count in ahead.items()]
            for batch in ([self._current] if self._current else []) + list(self._again):
                gone = time.monotonic() - batch.started if batch.started else 0.0
                seconds.append(max(0.0, (self._cost.seconds(batch.jobs[0].key, batch.bucket) or 0.0) - gone))
        known = [part for part in seconds if part is not None]
        return sum(known) if len(known) == len(seconds) else None

    async def submit(
        self,
        rows: Sequence[Row],
        *,
        priority: Priority = Priority.TRAINING,
        client: str = "",
        deadline: float | None = None,
    ) -> list[Made | BaseException]:
        """Makes variants; a row that could not be made has its exception in its place.

        A row that waits or runs already is not computed again. If the caller is cancelled (its client went away), rows
        that nobody else wants are dropped, even from a running batch.

        Args:
            rows: what to make.
            priority: the class they wait in.
            client: whose turns they take.
            deadline: instant of the event loop's clock at which unfinished rows are given up.

        Returns:
            In the order of the rows: Made, GenerationFailedError or DeadlinePassedError.
        """
        if self._closed:
            return [GenerationFailedError("the server is stopping") for _ in rows]
        if not rows:
            return []
        late = DeadlinePassedError("the deadline passed before the variant was finished")
        if deadline is not None and deadline <= self._loop.time():
            if self._on_drop is not None:
                self._on_drop(len(rows), "deadline")
            return [late for _ in rows]
        ticket = _Ticket(client, priority, time.monotonic(), self._loop.create_future(), [None] * len(rows), len(rows))
        self._enter(ticket, rows)
        timer = None if deadline is None else self._loop.call_at(deadline, self._leave, ticket, "deadline", late)
        try:
            await ticket.answered
        except asyncio.CancelledError as cancelled:
            self._leave(ticket, "cancelled", cancelled)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return [result for result in ticket.results if result is not None]

    async def idle(self) -> None:
        """Returns when nothing waits or runs."""
        await self._idle.wait()

    async def close(self) -> None:
        """Fails what waits or runs; a running batch ends at its next sampler step."""
        self._closed = True
        for ticket in list(self._tickets):
            self._leave(ticket, None, GenerationFailedError("the server is stopping"))

    # On the event loop ------------------------------------------------------------------------------------------------

    def _enter(self, ticket: _Ticket, rows: Sequence[Row]) -> None:
        new: list[_Job] = []
        joined: list[_Job] = []
        for position, row in enumerate(rows):
            job = self._flights.get(row.name)
            if job is None:
                key, client, priority = row.settings.batch_key, ticket.client, ticket.priority
                job = _Job(key=key, client=client, priority=priority, row=row, waiters=[(ticket, position)])
                self._flights[row.name] = job
                new.append(job)
            else:
                job.waiters.append((ticket, position))
                joined.append(job)
            ticket.jobs.append(job)
        self._tickets.add(ticket)
        self._unanswered += len(new)
        self._idle.clear()
        with self._lock:
            for job in joined:
                self._place_again(job)
            for job in new:
                self._schedule.add(job, ticket.arrived)
            wake, self._awake = not self._awake, True
        if wake:
            self._device.submit(self._turn)

    def _place_again(self, job: _Job) -> None:
        """Lets a job that waits take the turn of its most urgent waiter, if that has changed; needs the lock."""
        if job.lane is None:
            return
        foremost = min((ticket for ticket, _ in job.waiters), key=lambda ticket: ticket.priority)
        still_there = any(ticket.client == job.client for ticket, _ in job.waiters)
        if foremost.priority < job.priority or not still_there:
            self._schedule.discard(job)
            job.client, job.priority = foremost.client, foremost.priority
            self._schedule.add(job, time.monotonic())

    def _leave(self, ticket: _Ticket, reason: DropReason | None, error: BaseException) -> None:
        """Answers what is unanswered of a ticket with `error`, and drops the jobs that nobody else waits for."""
        self._tickets.discard(ticket)
        dropped = 0
        with self._lock:
            for position, job in enumerate(ticket.jobs):
                if ticket.results[position] is not None:
                    continue
                ticket.results[position] = error
                job.waiters = [waiter for waiter in job.waiters if waiter != (ticket, position)]
                if job.waiters:
                    self._place_again(job)
                    continue
                dropped += 1
                # Taken out of the flights even while it runs: who asks now must not join a batch that may stop.
                del self._flights[job.row.name]
                if job.lane is not None:
                    self._schedule.discard(job)
                    self._answered(1)
        if not ticket.answered.done():
            ticket.answered.set_result(None)
        if dropped and reason is not None and self._on_drop is not None:
            self._on_drop(dropped, reason)

    def _finish(self, batch: _Batch, images: UInt8Array | None, error: Exception | None, seconds: float) -> None:
        """Answers for a batch with its images or with an error; with neither, if nobody wants it any more."""
        wanted = sum(1 for job in batch.jobs if job.waiters)
        waits = []
        for position, job in enumerate(batch.jobs):
            if not job.waiters:
                continue
            del self._flights[job.row.name]
            waits.append(max(0.0, job.begun - job.waiters[0][0].arrived))
            for order, (ticket, place) in enumerate(job.waiters):
                if images is None:
                    ticket.results[place] = error
                else:
                    wait = max(0.0, job.begun - ticket.arrived)
                    ticket.results[place] = Made(images[position], 0.0 if order else seconds / wanted, order > 0, wait)
                ticket.left -= 1
                if ticket.left == 0:
                    self._tickets.discard(ticket)
                    if not ticket.answered.done():
                        ticket.answered.set_result(None)
        self._answered(len(batch.jobs))
        if self._on_batch is not None:
            self._on_batch(BatchReport(batch.bucket, wanted, seconds, waits, error is not None))

    def _answered(self, jobs: int) -> None:
        self._unanswered -= jobs
        if self._unanswered == 0:
            self._idle.set()

    # On the device's thread -------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Runs one batch, then queues up for the next behind whatever else wants the device."""
        with self._lock:
            batch = self._current = self._again.popleft() if self._again else self._cut()
            if batch is None:
                self._awake = False
                return
        batch.started = time.monotonic()
        for job in batch.jobs:
            job.begun = job.begun or batch.started
        outcome = self._compute(batch)
        seconds = time.monotonic() - batch.started
        if isinstance(outcome, np.ndarray) and all(batch.alive()):  # else it may have shrunk on the way
            self._cost.observe(batch.jobs[0].key, batch.bucket, seconds)
        with self._lock:
            self._current = None
            if isinstance(outcome, list):
                self._again.extendleft(reversed(outcome))
        try:
            if not isinstance(outcome, list):
                images, error = (None, outcome) if isinstance(outcome, GenerationFailedError) else (outcome, None)
                self._loop.call_soon_threadsafe(self._finish, batch, images, error, seconds)
            elif self._on_batch is not None:
                self._loop.call_soon_threadsafe(self._on_batch, BatchReport(batch.bucket, 0, seconds, [], True))
            self._device.submit(self._turn)
        except RuntimeError:
            log.debug("the event loop or the device's thread has ended, and the batcher with it")

    def _cut(self) -> _Batch | None:
        """Takes the next batch out of the schedule; needs the lock."""
        key = self._schedule.next_key(time.monotonic())
        if key is None:
            return None
        rows, bucket = self._cost.next_batch(key, self._schedule.waiting(key), self._buckets(key))
        return _Batch(self._schedule.take(key, rows), bucket)

    def _buckets(self, key: BatchKey) -> list[int]:
        """Returns the buckets that a batch key may use. Memory depends on the key: its image size, its guidance."""
        limit = self._limits.get(key)
        if limit is None:
            return self._engine.buckets
        return [bucket for bucket in self._engine.buckets if bucket < limit] + [limit]

    def _compute(self, batch: _Batch) -> UInt8Array | GenerationFailedError | list[_Batch] | None:
        """Returns the images, why there are none, or the parts in which to try again; None if nobody wants them."""
        try:
            if not any(batch.alive()):
                return None
            images, _ = self._engine.generate([job.row for job in batch.jobs], bucket=batch.bucket, alive=batch.alive)
            if len(images) != len(batch.jobs):
                raise RuntimeError(f"the generator made {len(images)} images of {len(batch.jobs)} rows")
            return images
        except Cancelled:
            return None
        except torch.OutOfMemoryError as error:
            log.warning("a batch of %d (%d rows) does not fit into memory: %s", batch.bucket, len(batch.jobs), error)
        except Exception:
            log.exception("a batch of %d (%d rows) failed", batch.bucket, len(batch.jobs))
            if len(batch.jobs) > 1:
                # Halves, not single rows: a bad row among 64 is found in 12 small batches.
                return self._parts(batch, len(batch.jobs) // 2)
            return GenerationFailedError("the generator failed on this row; see the server's log")
        return self._shrink(batch)  # outside of the handlers: the exception held on to the device's memory

    def _shrink(self, batch: _Batch) -> GenerationFailedError | list[_Batch]:
        """Halves the largest bucket of a batch's key after the device ran out of memory."""
        torch.cuda.empty_cache()
        if self._engine.deterministic:
            return GenerationFailedError(
                f"the device ran out of memory on a batch of {batch.bucket}, and deterministic batching cannot take "
                "smaller ones; lower the largest of `buckets` in the server's file"
            )
        if batch.bucket == 1:
            return GenerationFailedError("the device ran out of memory on this row alone; ask for a smaller image")
        key = batch.jobs[0].key
        with self._lock:
            # Of several parts that wait to be tried again, an older one may be larger than what was learnt since.
            limit = self._limits[key] = min(batch.bucket // 2, self._limits.get(key, batch.bucket))
            if len(self._limits) > KEYS:
                self._limits.popitem(last=False)
        log.warning("batches of this kind have at most %d rows from now on", limit)
        return self._parts(batch, limit)

    def _parts(self, batch: _Batch, most: int) -> list[_Batch]:
        parts = [batch.jobs[start : start + most] for start in range(0, len(batch.jobs), most)]
        buckets = self._buckets(batch.jobs[0].key)
        return [_Batch(jobs, next(bucket for bucket in buckets if bucket >= len(jobs))) for jobs in parts]
