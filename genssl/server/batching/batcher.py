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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np

from genssl.data.base import UInt8Array
from genssl.server.batching.cost import CostModel
from genssl.server.batching.jobs import (
    Again,
    Batch,
    BatchReport,
    DeadlinePassedError,
    DropReason,
    GenerationFailedError,
    Job,
    Made,
    Spent,
    Ticket,
)
from genssl.server.batching.memory_limits import MemoryLimits
from genssl.server.batching.runner import BatchRunner
from genssl.server.batching.schedule import BatchKey, Priority, Schedule
from genssl.variants.engine import Row, VariantEngine

TRUSTED_SECONDS = 30.0

log = logging.getLogger(__name__)


class Batcher:
    """One generator's queue. Lives on one event loop; several may share a device.

    Args:
        engine: computes batches.
        device: an executor with one thread, the one that owns the device.
        ageing_seconds: a waiting row rises by one class each time this has passed.
        on_batch: called on the event loop after each batch.
        on_drop: called on the event loop with a number of rows that nobody wants any more, and why.
        on_made: called on the event loop with each row that was computed and its image uint8 [3, h, w], which is
            read-only and holds nothing else in memory: as soon as its batch is done, before it is answered, and also
            if nobody waits for it any more. Not after `close`.
    """

    def __init__(
        self,
        engine: VariantEngine,
        device: Executor,
        *,
        ageing_seconds: float = 10.0,
        on_batch: Callable[[BatchReport], None] | None = None,
        on_drop: Callable[[int, DropReason], None] | None = None,
        on_made: Callable[[Row, UInt8Array], None] | None = None,
    ) -> None:
        self._engine, self._device = engine, device
        self._on_batch, self._on_drop, self._on_made = on_batch, on_drop, on_made
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._tickets: set[Ticket] = set()
        self._flights: dict[bytes, Job] = {}  # what waits or runs, by the name of its row
        self._unanswered = 0
        self._idle = asyncio.Event()
        self._idle.set()

        self._lock = threading.Lock()
        self._schedule: Schedule[Job] = Schedule(ageing_seconds)
        self._cost = CostModel()
        self._awake = False  # whether the device's thread is running a batch, or is about to look for one
        self._current: Batch | None = None
        self._again: deque[Batch] = deque()  # parts of batches that failed
        self._limits = MemoryLimits(engine.buckets)
        self._runner = BatchRunner(engine, self._limits)

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
        return self._limits.largest

    def queued_by_priority(self) -> dict[str, int]:
        """Returns how many rows wait by class, in lower case; ageing does not count."""
        return self._schedule.by_priority()

    def queued_of(self, client: str, holder: str = "") -> int:
        """Returns how many rows wait in a client's turn; a shared row waits in its most urgent submitter's."""
        return self._schedule.rows_of(client, holder)

    def predicted_wait(
        self,
        rows: Mapping[BatchKey, int],
        priority: Priority = Priority.TRAINING,
        *,
        client: str | None = None,
        holder: str = "",
    ) -> float | None:
        """Returns the seconds until the last of some new rows would be finished; None if that is unknown.

        It is unknown before any batch has been observed. While nothing of this generator waits or runs, an estimate for
        a key is trusted for 30 s after its latest batch, and none after that: what is refused is not computed, so an
        estimate that is too high would never be corrected. What is unknown of several keys counts nothing.

        Counts the batch that runs, what waits in better classes and what goes before them in their own. What other
        generators on the device hold up is not counted, nor are rows still to come. Takes a time that depends on the
        number of keys given, and not on what waits.

        Args:
            rows: how many would be submitted, by batch key.
            priority: their class.
            client: whose they are; without it, all that waits in the class counts as being ahead.
            holder: of the client, see `Schedule`.
        """
        if self._cost.latest_key is None:
            return None
        if not self._unanswered:
            rows = {key: count for key, count in rows.items() if self._cost.age(key) <= TRUSTED_SECONDS}
            if not rows:
                return None
        with self._lock:
            part = self._schedule.part_before(sum(rows.values()), priority, client, holder)
            seconds = self._schedule.backlog.seconds(rows, priority, part, self._price)
            for batch in ([self._current] if self._current else []) + list(self._again):
                gone = time.monotonic() - batch.started if batch.started else 0.0
                seconds += max(0.0, (self._cost.seconds(batch.jobs[0].key, batch.bucket) or 0.0) - gone)
        return seconds

    async def submit(
        self,
        rows: Sequence[Row],
        *,
        priority: Priority = Priority.TRAINING,
        client: str = "",
        holder: str = "",
        deadline: float | None = None,
        spent: Spent | None = None,
    ) -> list[Made | BaseException]:
        """Makes variants; a row that could not be made has its exception in its place.

        A row that waits or runs already is not computed again. If the caller is cancelled (its client went away), rows
        that nobody else wants are dropped; from a running batch where that saves time.

        Args:
            rows: what to make.
            priority: the class they wait in.
            client: whose turns they take.
            holder: of the client, whose share of the device they take.
            deadline: instant of the event loop's clock at which unfinished rows are given up.
            spent: gets the rows that were made, however the call ends.

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
        ticket = Ticket(
            client,
            priority,
            time.monotonic(),
            self._loop.create_future(),
            [None] * len(rows),
            len(rows),
            holder,
            spent or Spent(),
        )
        self._enter(ticket, rows)
        timer = None if deadline is None else self._loop.call_at(deadline, self._leave, ticket, "deadline", late)
        try:
            await ticket.answered
        except asyncio.CancelledError:
            # Not this exception: its traceback would keep the whole call, in a cycle through the results.
            self._leave(ticket, "cancelled", GenerationFailedError("the call was cancelled"))
            raise
        finally:
            ticket.jobs.clear()  # they lead back to the ticket, and images would stay until the garbage is collected
            if timer is not None:
                timer.cancel()
        return [result for result in ticket.results if result is not None]

    async def idle(self) -> None:
        """Returns when nothing waits or runs."""
        await self._idle.wait()

    async def close(self) -> None:
        """Fails what waits or runs; a running batch ends at its next sampler step."""
        self._closed = True
        self._fail_all("the server is stopping")

    # On the event loop ------------------------------------------------------------------------------------------------

    def _enter(self, ticket: Ticket, rows: Sequence[Row]) -> None:
        new: list[Job] = []
        joined: list[Job] = []
        for position, row in enumerate(rows):
            job = self._flights.get(row.name)
            if job is None:
                key, client, priority = row.settings.batch_key, ticket.client, ticket.priority
                job = Job(key=key, client=client, priority=priority, holder=ticket.holder, row=row)
                self._flights[row.name] = job
                new.append(job)
            else:
                joined.append(job)
            job.join(ticket, position)
            ticket.jobs.append(job)
        self._tickets.add(ticket)
        self._unanswered += len(new)
        self._idle.clear()
        with self._lock:
            for job in joined:
                self._place_again(job)
            for job in new:
                self._schedule.add(job, ticket.arrived)
            self._schedule.backlog.settle(self._price)
            wake, self._awake = not self._awake, True
        if wake:
            self._device.submit(self._turn)

    def _place_again(self, job: Job) -> None:
        """Lets a job that waits take the turn of its most urgent waiter, if that has changed; needs the lock."""
        if job.lane is None:
            return
        first = job.foremost()
        if (first.holder, first.client, first.priority) != (job.holder, job.client, job.priority):
            self._schedule.discard(job)
            job.holder, job.client, job.priority = first.holder, first.client, first.priority
            self._schedule.add(job, time.monotonic())

    def _price(self, key: BatchKey, rows: int) -> float:
        return self._cost.predict(key, rows, self._limits.buckets(key)) or 0.0

    def _leave(self, ticket: Ticket, reason: DropReason | None, error: BaseException) -> None:
        """Answers what is unanswered of a ticket with `error`, and drops the jobs that nobody else waits for."""
        self._tickets.discard(ticket)
        dropped = 0
        with self._lock:
            for position, job in enumerate(ticket.jobs):
                if ticket.results[position] is not None:
                    continue
                ticket.results[position] = error
                ticket.spent.rows += job.begun > 0
                job.leave()
                if job.waiters:
                    self._place_again(job)
                    continue
                dropped += 1
                # Taken out of the flights even while it runs: who asks now must not join a batch that may stop.
                del self._flights[job.row.name]
                if job.lane is not None:
                    self._schedule.discard(job)
                    self._answered(1)
            self._schedule.backlog.settle(self._price)
        if not ticket.answered.done():
            ticket.answered.set_result(None)
        if dropped and reason is not None and self._on_drop is not None:
            self._on_drop(dropped, reason)

    def _fail_all(self, message: str) -> None:
        for ticket in list(self._tickets):
            self._leave(ticket, None, GenerationFailedError(message))

    def _finish(
        self, batch: Batch, images: list[UInt8Array | None] | None, error: GenerationFailedError | None, seconds: float
    ) -> None:
        """Answers for a batch with its images or with an error; with neither, if nobody wants it any more."""
        wanted = sum(1 for job in batch.jobs if job.waiters)
        waits = []
        for position, job in enumerate(batch.jobs):
            image = images[position] if images is not None else None
            if image is not None and self._on_made is not None and not self._closed:
                try:
                    self._on_made(job.row, image)
                except Exception:  # whoever keeps the images must not take the answers with it
                    log.exception("a variant was made but not kept")
            if not job.waiters:
                continue
            del self._flights[job.row.name]
            waits.append(max(0.0, job.begun - job.foremost().arrived))
            self._tickets.difference_update(job.answer(error if image is None else image, seconds / wanted))
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
        batch, started = None, time.monotonic()
        outcome: list[UInt8Array | None] | GenerationFailedError | Again | None
        try:
            with self._lock:
                batch = self._current = self._again.popleft() if self._again else self._cut()
                if batch is None:
                    self._awake = False
                    return
            outcome = self._run(batch)
        except BaseException:  # nobody reads this turn's future: what ended here would leave all rows without an answer
            log.exception("the batcher failed")
            outcome = GenerationFailedError("the server failed on this row; see its log")
        seconds = time.monotonic() - started
        with self._lock:
            self._current = None
            if batch is not None:
                self._schedule.charge(batch.jobs, seconds / len(batch.jobs))
            # Without a batch to blame, the next turn might fail the same way at once: it waits for the next submitter.
            self._awake = batch is not None
            if isinstance(outcome, Again):
                self._again.extendleft(reversed(outcome.parts))
        try:
            if batch is None:
                self._loop.call_soon_threadsafe(self._fail_all, "the server failed on this row; see its log")
                return
            if not isinstance(outcome, Again):
                images, error = (None, outcome) if isinstance(outcome, GenerationFailedError) else (outcome, None)
                self._loop.call_soon_threadsafe(self._finish, batch, images, error, seconds)
            elif self._on_batch is not None:
                self._loop.call_soon_threadsafe(self._on_batch, BatchReport(batch.bucket, 0, seconds, [], True))
            self._device.submit(self._turn)
        except RuntimeError:
            log.debug("the event loop or the device's thread has ended, and the batcher with it")

    def _run(self, batch: Batch) -> list[UInt8Array | None] | GenerationFailedError | Again | None:
        batch.started = time.monotonic()
        for job in batch.jobs:
            job.begun = job.begun or batch.started
        outcome = self._runner.compute(batch)
        if not isinstance(outcome, np.ndarray):
            return outcome
        if not batch.lost:  # else it may have shrunk on the way
            self._cost.observe(batch.jobs[0].key, batch.bucket, time.monotonic() - batch.started)
        return batch.own_images(outcome)

    def _cut(self) -> Batch | None:
        """Takes the next batch out of the schedule; needs the lock."""
        key = self._schedule.next_key(time.monotonic())
        if key is None:
            return None
        rows, bucket = self._cost.next_batch(key, self._schedule.waiting(key), self._limits.buckets(key))
        jobs = self._schedule.take(key, rows)
        self._schedule.backlog.settle(self._price)
        return Batch(jobs, bucket)
