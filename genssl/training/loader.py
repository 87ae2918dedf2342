"""Loads the sources of coming steps, in threads (Pillow and file reading release the GIL) or in processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from genssl.data.base import ImageDataset, UInt8Array, pixels_of
from genssl.data.crops import CropDraws
from genssl.data.workers import DecodingWorkers, read_images
from genssl.variants.plan import StepPlan
from genssl.views.compose import Crops

ROWS_PER_TASK = 16  # one message to a worker process, one task of a thread: small images take less time than a task


class SourceLoader:
    """Reads whole batches in plan order, `ahead` of them before they are needed.

    `crops` says how the views of a step are cropped from images with sizes of their own; images of a data set that has
    one size for all are loaded whole, and cropped on the device. Processes decode in place of threads if there are any
    `workers`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        crops: Callable[[StepPlan], Sequence[CropDraws]],
        *,
        threads: int,
        ahead: int,
        workers: int = 0,
    ) -> None:
        self._dataset, self._ahead = dataset, ahead
        self._crops = crops if pixels_of(dataset) is not None else None
        self._workers = DecodingWorkers(dataset, workers) if workers else None
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="genssl-loader")

    def batches(self, plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, torch.Tensor | Crops]]:
        """Yields each plan with its sources, uint8 [B, 3, S, S] or crops; raises DataError when one is corrupt."""
        pending: deque[tuple[StepPlan, list[Future[list[UInt8Array]]]]] = deque()
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

    def _read(self, plan: StepPlan) -> list[Future[list[UInt8Array]]]:
        rows, crops = plan.rows.tolist(), self._crops(plan) if self._crops is not None else ()
        parts = [slice(start, start + ROWS_PER_TASK) for start in range(0, len(rows), ROWS_PER_TASK)]
        tasks = [(rows[part], [one.of(part) for one in crops]) for part in parts]
        if self._workers is None:
            return [self._pool.submit(read_images, self._dataset, *task) for task in tasks]
        return [self._workers.read(*task) for task in tasks]

    def _collect(self, plan: StepPlan, parts: list[Future[list[UInt8Array]]]) -> tuple[StepPlan, torch.Tensor | Crops]:
        read = [part.result() if self._workers is None else self._workers.result(part) for part in parts]
        images = tuple(torch.from_numpy(np.concatenate(kind)) for kind in zip(*read, strict=True))
        return plan, images[0] if self._crops is None else Crops(images)
