"""Merges the rows of all requests into device batches.

Whatever waits when the device becomes free goes into the next batch: no delay is added, and under load batches are full
by themselves. (A fixed wait after the first request cuts small batches while the device is still busy.)
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from genssl.data.base import UInt8Array
from genssl.variants.engine import Row, VariantEngine

log = logging.getLogger(__name__)


class GenerationFailedError(Exception):
    """The generator raised while it computed a batch; the reason is in the server's log."""


@dataclass(frozen=True)
class Made:
    """A variant uint8 [3, h, w], and its share of the batch's device seconds."""

    image: UInt8Array
    seconds: float


@dataclass(frozen=True, eq=False)
class _Job:
    row: Row
    key: tuple[object, ...]
    future: asyncio.Future[Made]


class Batcher:
    """One generator's queue, first come, first served. Lives on one event loop.

    Args:
        engine: computes batches.
        device: an executor with one thread, the one that owns the device.
    """

    def __init__(self, engine: VariantEngine, device: Executor) -> None:
        self._engine, self._device = engine, device
        self._queue: deque[_Job] = deque()
        self._waiting = asyncio.Event()
        self._worker = asyncio.get_running_loop().create_task(self._work())

    @property
    def queued(self) -> int:
        """Rows that wait for the device."""
        return len(self._queue)

    async def submit(self, rows: Sequence[Row]) -> list[Made | BaseException]:
        """Makes variants; a row whose batch failed has its exception in its place.

        If the caller is cancelled (its client went away, or its deadline passed), rows not yet begun are dropped.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(row, row.settings.batch_key, loop.create_future()) for row in rows]
        self._queue.extend(jobs)
        self._waiting.set()
        # gather cancels the futures when this coroutine is cancelled; the worker passes over cancelled jobs.
        return await asyncio.gather(*(job.future for job in jobs), return_exceptions=True)

    async def close(self) -> None:
        """Stops the worker and fails what still waits."""
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        for job in self._queue:
            job.future.cancel()
        self._queue.clear()

    def _next_batch(self) -> list[_Job]:
        """Takes the oldest row, and with it the oldest others that can share its batch."""
        batch: list[_Job] = []
        kept: deque[_Job] = deque()
        while self._queue and len(batch) < self._engine.buckets[-1]:
            job = self._queue.popleft()
            if job.future.done():
                continue
            (batch if not batch or job.key == batch[0].key else kept).append(job)
        self._queue.extendleft(reversed(kept))
        return batch

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._next_batch()
            if not batch:
                self._waiting.clear()
                await self._waiting.wait()
                continue
            try:
                images, seconds = await loop.run_in_executor(
                    self._device, self._engine.generate, [job.row for job in batch]
                )
                if len(images) != len(batch):
                    raise RuntimeError(f"the generator made {len(images)} images of {len(batch)} rows")
            except Exception:
                log.exception("a batch of %d rows failed", len(batch))
                for job in batch:
                    if not job.future.done():
                        job.future.set_exception(
                            GenerationFailedError("the generator failed on this batch; see the server's log")
                        )
                continue
            for job, image in zip(batch, images, strict=True):
                if not job.future.done():
                    job.future.set_result(Made(image, seconds / len(batch)))
