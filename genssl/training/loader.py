"""Loads the sources of coming steps, in threads (Pillow and file reading release the GIL) or in processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.workers import DecodingWorkers
from genssl.variants.plan import StepPlan

ROWS_PER_TASK = 16  # of a worker process: one message for so many images


class SourceLoader:
    """Reads whole batches ahead of the training, in plan order.

    Args:
        dataset: has the images.
        threads: that decode.
        ahead: batches kept ready.
        workers: processes that decode in place of the threads; 0: none.
    """

    def __init__(self, dataset: ImageDataset, *, threads: int, ahead: int, workers: int = 0) -> None:
        self._dataset, self._ahead = dataset, ahead
        self._workers = DecodingWorkers(dataset, workers) if workers else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="genssl-loader")

    def batches(self, plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, torch.Tensor]]:
        """Yields each plan with its sources uint8 [B, 3, S, S]; raises DataError when an image is corrupt."""
        pending: deque[tuple[StepPlan, list[Future[UInt8Array]]]] = deque()
        for plan in plans:
            pending.append((plan, self._read(plan)))
            if len(pending) > self._ahead:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def close(self) -> None:
        """Ends the threads and processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._workers is not None:
            self._workers.close()

    def _read(self, plan: StepPlan) -> list[Future[UInt8Array]]:
        if self._workers is None:
            return [self._pool.submit(self._dataset.image, int(row)) for row in plan.rows]
        starts = range(0, len(plan.rows), ROWS_PER_TASK)
        return [self._workers.read(plan.rows[start : start + ROWS_PER_TASK].tolist()) for start in starts]

    def _collect(self, plan: StepPlan, images: list[Future[UInt8Array]]) -> tuple[StepPlan, torch.Tensor]:
        if self._workers is None:
            return plan, torch.from_numpy(np.stack([image.result() for image in images]))
        return plan, torch.from_numpy(np.concatenate([self._workers.result(part) for part in images]))
