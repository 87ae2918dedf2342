"""Gives freed memory back to the system: glibc keeps blocks of up to 32 MB for later, in an arena for each thread.

What clients made a server hold would otherwise stay with it: messages in the arenas of gRPC's threads, then pixels in
those of the codec's, then answers, each as much as the bound on all of them together. Where there is no glibc, nothing
is done.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

STEP_BYTES = 64 * 2**20
PAUSE = 1.0


class HeapTrimmer:
    """Trims the heap once enough was freed, at most once a second. Lives on one event loop.

    Args:
        step_bytes: how much is freed before the heap is worth the milliseconds that trimming it takes.
    """

    def __init__(self, step_bytes: int = STEP_BYTES) -> None:
        self._step, self._freed = step_bytes, 0
        self._waiting = False
        self._trim: Callable[[int], object] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)

    def freed(self, num_bytes: int) -> None:
        """Counts bytes that were freed, or will be in a moment."""
        self._freed += num_bytes
        if self._freed >= self._step and not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().call_later(PAUSE, self._start)

    def _start(self) -> None:
        self._freed, self._waiting = 0, False
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
