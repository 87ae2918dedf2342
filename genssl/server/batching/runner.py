"""Computes batches on the device's thread, and says what becomes of those that fail."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from genssl.data.base import UInt8Array
from genssl.errors import RequestRefusedError
from genssl.generators.base import Cancelled
from genssl.generators.finite import NotFiniteError
from genssl.server.batching.cost import CostModel, MemoryLimits
from genssl.server.batching.jobs import Batch, BatchOutcome, GenerationFailedError
from genssl.variants.engine import VariantEngine

log = logging.getLogger(__name__)


class BatchRunner:
    """Computes batches, and learns what they cost and how large they may be."""

    def __init__(
        self, engine: VariantEngine, cost: CostModel, limits: MemoryLimits, clock: Callable[[], float]
    ) -> None:
        self._engine, self._cost, self._limits, self._clock = engine, cost, limits, clock

    def run(self, batch: Batch) -> BatchOutcome:
        """Computes a batch, or says why there are no images and whether to try again in parts."""
        batch.started = self._clock()
        for job in batch.jobs:
            job.begun = job.begun or batch.started
        key = batch.jobs[0].key
        try:
            if not any(job.waiters for job in batch.jobs):
                return BatchOutcome()
            images = self._generate(batch)
        except Cancelled:
            return BatchOutcome()
        except torch.OutOfMemoryError as error:
            log.warning("a batch of %d (%d rows) does not fit into memory: %s", batch.bucket, len(batch.jobs), error)
        except Exception as error:
            # One traceback a batch, and of what it is split into a line each: they mostly fail for the same reason.
            again = "again, " if batch.retried else ""
            what = f"{again}a batch of %d (%d rows) failed: %r"
            log.error(what, batch.bucket, len(batch.jobs), error, exc_info=not batch.retried)
            if len(batch.jobs) > 1:
                # Halves, not single rows: a bad row among 64 is found in 12 small batches.
                return BatchOutcome(parts=batch.split(len(batch.jobs) // 2, self._limits.buckets(key)))
            # A dtype that overflows is for the client to read too, and so is what its request asked too much of. Other
            # messages, of users' errors as well, may name paths of this machine.
            for_client = isinstance(error, NotFiniteError | RequestRefusedError)
            message = str(error) if for_client else "the generator failed on this row; see the server's log"
            return BatchOutcome(error=GenerationFailedError(message))
        else:
            if not batch.lost:  # else it may have shrunk on the way
                self._cost.observe(key, batch.bucket, self._clock() - batch.started)
            return BatchOutcome([None if place in batch.lost else _own(image) for place, image in enumerate(images)])
        return self._shrink(batch)  # outside of the handlers: the exception held on to the device's memory

    def _generate(self, batch: Batch) -> UInt8Array:
        sizes = [] if self._engine.deterministic else self._engine.buckets
        rows = [job.row for job in batch.jobs]
        images, _ = self._engine.generate(rows, bucket=batch.bucket, alive=lambda: batch.keep(sizes))
        if len(images) != len(rows):
            raise RuntimeError(f"the generator made {len(images)} images of {len(rows)} rows")
        return images

    def _shrink(self, batch: Batch) -> BatchOutcome:
        """Halves the largest bucket of a batch's key after the device ran out of memory."""
        torch.cuda.empty_cache()
        if self._engine.deterministic:
            message = (
                f"the device ran out of memory on a batch of {batch.bucket}, and deterministic batching cannot take "
                "smaller ones; lower the largest of `buckets` in the server's file"
            )
            return BatchOutcome(error=GenerationFailedError(message))
        if batch.bucket == 1:
            message = "the device ran out of memory on this row alone; ask for a smaller image"
            return BatchOutcome(error=GenerationFailedError(message))
        key = batch.jobs[0].key
        limit = self._limits.halve(key, batch.bucket)
        log.warning("batches of this kind have at most %d rows from now on", limit)
        return BatchOutcome(parts=batch.split(limit, self._limits.buckets(key)))


def _own(image: UInt8Array) -> UInt8Array:
    """Copies a row: as a view it would keep its whole batch in memory for as long as anyone holds it."""
    own = image.copy()
    own.flags.writeable = False  # answers, caches and the store share it
    return own
