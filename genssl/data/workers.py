"""Processes that read and decode images beside the training, for data sets of large files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait

import numpy as np

from genssl.data.base import ImageDataset, UInt8Array, pixels_of
from genssl.data.crops import CropDraws, cut
from genssl.errors import UserError

_dataset: ImageDataset | None = None  # of this worker process


def read_images(dataset: ImageDataset, rows: Sequence[int], crops: Sequence[CropDraws] = ()) -> list[UInt8Array]:
    """Reads images, or crops of them.

    Args:
        dataset: has the images; for crops it has `pixels`.
        rows: N of them.
        crops: each of the N images.

    Returns:
        uint8 [N, 3, S, S], or for each of the crops uint8 [N, 3, size, size].
    """
    if not crops:
        return [np.stack([dataset.image(row) for row in rows])]
    pixels = pixels_of(dataset)
    assert pixels is not None, "crops are of images with sizes of their own"
    cuts = [cut(pixels(row), [one.of(slice(i, i + 1)) for one in crops]) for i, row in enumerate(rows)]
    return [np.stack(images) for images in zip(*cuts, strict=True)]


class DecodingWorkers:
    """Reads rows of a data set in processes of their own, started by forkserver: gRPC and CUDA do not survive fork.

    Worth it where decoding takes the interpreter's time from the training: Pillow releases its lock while it decodes,
    but not in between. A worker imports what the data set needs, which takes seconds and some hundred megabytes.

    Args:
        dataset: has the images; every worker gets a copy.
        count: of processes, at least 1.
    """

    def __init__(self, dataset: ImageDataset, count: int) -> None:
        self._name, self._count = dataset.name, count
        try:
            copy = pickle.dumps(dataset)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UserError(
                f"train.workers: data set {dataset.name} cannot be copied to other processes ({error}); "
                "set train.workers: 0"
            ) from None
        # Workers end when the other end of this pipe is closed, here or by the end of this process.
        lifeline, self._lifeline = multiprocessing.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(
            count, mp_context=multiprocessing.get_context("forkserver"), initializer=_begin, initargs=(copy, lifeline)
        )

    def read(self, rows: Sequence[int], crops: Sequence[CropDraws] = ()) -> Future[list[UInt8Array]]:
        """Begins to read rows; the result is that of `read_images`, see `result`."""
        try:
            return self._pool.submit(_read, [int(row) for row in rows], crops)
        except BrokenProcessPool:
            raise self._ended() from None

    def result(self, reading: Future[list[UInt8Array]]) -> list[UInt8Array]:
        """Waits for what was begun; raises DataError if an image is corrupt, UserError if a worker has ended."""
        try:
            return reading.result()
        except BrokenProcessPool:
            raise self._ended() from None

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._lifeline.close()

    def _ended(self) -> UserError:
        return UserError(
            f"train.workers: one of the {self._count} processes that decode {self._name} has ended, most likely for "
            "want of memory; lower train.workers, or set it to 0"
        )


def _begin(dataset: bytes, lifeline: Connection) -> None:
    global _dataset
    _dataset = pickle.loads(dataset)
    # A signal to the whole job is for the training to heed, which may want its last batches for a checkpoint. The pool
    # itself terminates workers by SIGTERM after one has died; the lifeline does that in its place.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    wait([lifeline])
    os._exit(1)


def _read(rows: list[int], crops: Sequence[CropDraws]) -> list[UInt8Array]:
    assert _dataset is not None, "the worker has begun"
    return read_images(_dataset, rows, crops)
