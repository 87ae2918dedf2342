"""Computes batches on the device's thread, and says what becomes of those that fail."""

from __future__ import annotations

import logging

import torch

from genssl.data.base import UInt8Array
from genssl.errors import RequestRefusedError
from genssl.generators.base import Cancelled
from genssl.generators.finite import NotFiniteError
from genssl.server.batching.jobs import Again, Batch, GenerationFailedError
from genssl.server.batching.memory_limits import MemoryLimits
from genssl.variants.engine import VariantEngine

log = logging.getLogger(__name__)


class BatchRunner:
    """Computes batches, tries parts of those that fail, and learns how large they may be.

    Args:
        engine: computes batches.
        limits: of their sizes; halved where the device runs out of memory.
    """

    def __init__(self, engine: VariantEngine, limits: MemoryLimits) -> None:
        self._engine, self._limits = engine, limits

    def compute(self, batch: Batch) -> UInt8Array | GenerationFailedError | Again | None:
        """Returns the images, why there are none, or the parts in which to try again; None if nobody wants them."""
        try:
            if not any(batch.wanted()):
                return None
            sizes = [] if self._engine.deterministic else self._engine.buckets
            images, _ = self._engine.generate(
                [job.row for job in batch.jobs], bucket=batch.bucket, alive=lambda: batch.keep(sizes)
            )
            if len(images) != len(batch.jobs):
                raise RuntimeError(f"the generator made {len(images)} images of {len(batch.jobs)} rows")
            return images
        except Cancelled:
            return None
        except torch.OutOfMemoryError as error:
            log.warning("a batch of %d (%d rows) does not fit into memory: %s", batch.bucket, len(batch.jobs), error)
        except Exception as error:
            # One traceback a batch, and of what it is split into a line each: they mostly fail for the same reason.
            what = "again, a batch of %d (%d rows) failed: %r" if batch.again else "a batch of %d (%d rows) failed: %r"
            log.error(what, batch.bucket, len(batch.jobs), error, exc_info=not batch.again)
            if len(batch.jobs) > 1:
                # Halves, not single rows: a bad row among 64 is found in 12 small batches.
                return batch.split(len(batch.jobs) // 2, self._limits.buckets(batch.jobs[0].key))
            # A dtype that overflows is for the client to read too, and so is what its request asked too much of. Other
            # messages, of users' errors as well, may name paths of this machine.
            if isinstance(error, NotFiniteError | RequestRefusedError):
                return GenerationFailedError(str(error))
            return GenerationFailedError("the generator failed on this row; see the server's log")
        return self._shrink(batch)  # outside of the handlers: the exception held on to the device's memory

    def _shrink(self, batch: Batch) -> GenerationFailedError | Again:
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
        limit = self._limits.halve(key, batch.bucket)
        log.warning("batches of this kind have at most %d rows from now on", limit)
        return batch.split(limit, self._limits.buckets(key))
