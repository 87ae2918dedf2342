"""Loads the sources of coming steps in threads (Pillow and file reading release the interpreter's lock)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from genssl.data.base import ImageDataset, UInt8Array
from genssl.variants.plan import StepPlan


class SourceLoader:
    """Reads whole batches ahead of the training, in plan order.

    Args:
        dataset: has the images.
        threads: that decode.
        ahead: batches kept ready.
    """

    def __init__(self, dataset: ImageDataset, *, threads: int, ahead: int) -> None:
        self._dataset, self._ahead = dataset, ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="genssl-loader")

    def batches(self, plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, torch.Tensor]]:
        """Yields each plan with its sources uint8 [B, 3, S, S]; raises DataError when an image is corrupt."""
        pending: deque[tuple[StepPlan, list[Future[UInt8Array]]]] = deque()
        for plan in plans:
            pending.append((plan, [self._pool.submit(self._dataset.image, int(row)) for row in plan.rows]))
            if len(pending) > self._ahead:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _collect(self, plan: StepPlan, images: list[Future[UInt8Array]]) -> tuple[StepPlan, torch.Tensor]:
        return plan, torch.from_numpy(np.stack([image.result() for image in images]))
