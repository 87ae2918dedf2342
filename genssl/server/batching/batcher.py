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

from genssl.server.batching.cost import CostModel, MemoryLimits
from genssl.server.batching.jobs import (
    Batch,
    BatchListener,
    BatchOutcome,
    BatchReport,
    Caller,
    DeadlinePassedError,
    DropReason,
    GenerationFailedError,
    Job,
    MadeImage,
    Ticket,
)
from genssl.server.batching.runner import BatchRunner
from genssl.server.batching.schedule import BatchKey, Schedule, Submitter
from genssl.variants.engine import Row, VariantEngine

TRUSTED_SECONDS = 30.0
BUG = "the server failed on this row; see its log"

log = logging.getLogger(__name__)


class Batcher:
    """One generator's queue. Lives on one event loop; several may share a device.

    Args:
        engine: computes batches.
        device: an executor with one thread, the one that owns the device.
        listener: is told what happens, on the event loop; of images not after `close`.
        ageing_seconds: a waiting row rises by one class each time this has passed.
        clock: seconds that never go back.

    Attributes:
        cost: what batches cost; give it the warm-up's batches before the first row is submitted.
    """

    def __init__(
        self,
        engine: VariantEngine,
        device: Executor,
        listener: BatchListener | None = None,
        *,
        ageing_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cost = CostModel(clock)
        self._device, self._listener, self._clock = device, listener or BatchListener(), clock
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._tickets: set[Ticket] = set()
        self._unfinished: dict[bytes, Job] = {}  # what waits or runs, by the name of its row
        self._unanswered = 0

        self._lock = threading.Lock()
        self._schedule: Schedule[Job] = Schedule(ageing_seconds)
        self._awake = False  # whether the device's thread is running a batch, or is about to look for one
        self._current: Batch | None = None
        self._retries: deque[Batch] = deque()  # parts of batches that failed
        self._limits = MemoryLimits(engine.buckets)
        self._runner = BatchRunner(engine, self.cost, self._limits, clock)

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

    def predicted_wait(self, rows: Mapping[BatchKey, int], submitter: Submitter) -> float | None:
        """Returns the seconds until the last of some new rows, counted by batch key, would be finished; or None.

        That is unknown before any batch has been observed. While nothing of this generator waits or runs, an estimate
        for a key is trusted for 30 s after its latest batch, and none after that: what is refused is not computed, so
        an estimate that is too high would never be corrected. What is unknown of several keys counts nothing.

        Counts the batch that runs, what waits in better classes and what goes before them in their own. What other
        generators on the device hold up is not counted, nor are rows still to come. Takes a time that depends on the
        number of keys given, and not on what waits.
        """
        if self.cost.latest_key is None:
            return None
        if not self._unanswered:
            rows = {key: count for key, count in rows.items() if self.cost.age(key) <= TRUSTED_SECONDS}
            if not rows:
                return None
        with self._lock:
            part = self._schedule.part_before(sum(rows.values()), submitter)
            seconds = self._schedule.backlog.seconds(rows, submitter.priority, part, self._price)
            for batch in ([self._current] if self._current else []) + list(self._retries):
                gone = self._clock() - batch.started if batch.started else 0.0
                seconds += max(0.0, (self.cost.seconds(batch.jobs[0].key, batch.bucket) or 0.0) - gone)
        return seconds

    async def submit(self, rows: Sequence[Row], caller: Caller) -> list[MadeImage | Exception]:
        """Makes variants; a row that could not be made has GenerationFailedError or DeadlinePassedError in its place.

        A row that waits or runs already is not computed again. If the caller is cancelled (its client went away), rows
        that nobody else wants are dropped; from a running batch where that saves time.
        """
        if self._closed:
            return [GenerationFailedError("the server is stopping") for _ in rows]
        if not rows:
            return []
        late = DeadlinePassedError("the deadline passed before the variant was finished")
        if caller.deadline is not None and caller.deadline <= self._loop.time():
            self._listener.rows_dropped(len(rows), "deadline")
            return [late for _ in rows]
        ticket = Ticket(caller, self._clock(), self._loop.create_future(), [None] * len(rows), len(rows))
        self._enter(ticket, rows)
        timer = None
        if caller.deadline is not None:
            timer = self._loop.call_at(caller.deadline, self._leave, ticket, "deadline", late)
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

    async def close(self) -> None:
        """Fails what waits or runs; a running batch ends at its next sampler step."""
        self._closed = True
        self._fail_all("the server is stopping")

    # On the event loop ------------------------------------------------------------------------------------------------

    def _enter(self, ticket: Ticket, rows: Sequence[Row]) -> None:
        submitter = ticket.caller.submitter
        new: list[Job] = []
        joined: list[Job] = []
        for position, row in enumerate(rows):
            job = self._unfinished.get(row.name)
            if job is None:
                job = self._unfinished[row.name] = Job(key=row.settings.batch_key, submitter=submitter, row=row)
                new.append(job)
            else:
                joined.append(job)
            job.join(ticket, position)
            ticket.jobs.append(job)
        self._tickets.add(ticket)
        self._unanswered += len(new)
        with self._lock:
            for job in joined:
                self._give_to_foremost(job)
            for job in new:
                self._schedule.add(job, ticket.arrived)
            self._schedule.backlog.settle(self._price)
            wake, self._awake = not self._awake, True
        if wake:
            self._device.submit(self._run_next)

    def _give_to_foremost(self, job: Job) -> None:
        """Lets a job that waits take the turn of its most urgent waiter, if that has changed; needs the lock."""
        if job.lane is not None and (submitter := job.foremost().caller.submitter) != job.submitter:
            self._schedule.pass_on(job, submitter, self._clock())

    def _price(self, key: BatchKey, rows: int) -> float:
        return self.cost.predict(key, rows, self._limits.buckets(key)) or 0.0

    def _leave(self, ticket: Ticket, reason: DropReason | None, error: Exception) -> None:
        """Answers what is unanswered of a ticket with `error`, and drops the jobs that nobody else waits for."""
        self._tickets.discard(ticket)
        dropped = 0
        with self._lock:
            for position, job in enumerate(ticket.jobs):
                if ticket.results[position] is not None:
                    continue
                ticket.results[position] = error
                ticket.caller.spent += job.begun > 0
                job.leave()
                if job.waiters:
                    self._give_to_foremost(job)
                    continue
                dropped += 1
                # Forgotten even while it runs: who asks now must not join a batch that may stop.
                del self._unfinished[job.row.name]
                if job.lane is not None:
                    self._schedule.discard(job)
                    self._unanswered -= 1
            self._schedule.backlog.settle(self._price)
        if not ticket.answered.done():
            ticket.answered.set_result(None)
        if dropped and reason is not None:
            self._listener.rows_dropped(dropped, reason)

    def _fail_all(self, message: str) -> None:
        for ticket in list(self._tickets):
            self._leave(ticket, None, GenerationFailedError(message))

    def _finish(self, batch: Batch, outcome: BatchOutcome, seconds: float) -> None:
        """Answers for a batch with its images or its error."""
        wanted = sum(1 for job in batch.jobs if job.waiters)
        images = outcome.images or [None] * len(batch.jobs)
        waits = []
        for job, image in zip(batch.jobs, images, strict=True):
            if image is not None and not self._closed:
                try:
                    self._listener.image_made(job.row, image)
                except Exception:  # whoever keeps the images must not take the answers with it
                    log.exception("a variant was made but not kept")
            if not job.waiters:
                continue
            del self._unfinished[job.row.name]
            waits.append(max(0.0, job.begun - job.foremost().arrived))
            self._tickets.difference_update(job.answer(outcome.error if image is None else image, seconds / wanted))
        self._unanswered -= len(batch.jobs)
        self._listener.batch_done(BatchReport(batch.bucket, wanted, seconds, waits, outcome.error is not None))

    # On the device's thread -------------------------------------------------------------------------------------------

    def _run_next(self) -> None:
        """Runs one batch, then queues up for the next behind whatever else wants the device."""
        batch, started = None, self._clock()
        try:
            with self._lock:
                batch = self._current = self._retries.popleft() if self._retries else self._cut()
                if batch is None:
                    self._awake = False
                    return
            outcome = self._runner.run(batch)
        except BaseException:  # nobody reads this turn's future: what ended here would leave all rows without an answer
            log.exception("the batcher failed")
            outcome = BatchOutcome(error=GenerationFailedError(BUG))
        seconds = self._clock() - started
        with self._lock:
            self._current = None
            if batch is not None:
                self._schedule.charge(batch.jobs, seconds / len(batch.jobs))
            # Without a batch to blame, the next turn might fail the same way at once: it waits for the next submitter.
            self._awake = batch is not None
            self._retries.extendleft(reversed(outcome.parts))
        try:
            if batch is None:
                self._loop.call_soon_threadsafe(self._fail_all, BUG)
                return
            if outcome.parts:
                failed = BatchReport(batch.bucket, 0, seconds, [], True)
                self._loop.call_soon_threadsafe(self._listener.batch_done, failed)
            else:
                self._loop.call_soon_threadsafe(self._finish, batch, outcome, seconds)
            self._device.submit(self._run_next)
        except RuntimeError:
            log.debug("the event loop or the device's thread has ended, and the batcher with it")

    def _cut(self) -> Batch | None:
        """Takes the next batch out of the schedule; needs the lock."""
        key = self._schedule.next_key(self._clock())
        if key is None:
            return None
        rows, bucket = self.cost.next_batch(key, self._schedule.backlog.waiting(key), self._limits.buckets(key))
        jobs = self._schedule.take(key, rows)
        self._schedule.backlog.settle(self._price)
        return Batch(jobs, bucket)
