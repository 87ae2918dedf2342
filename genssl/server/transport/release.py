"""Gives back what calls hold: streams whose client does not read, and memory that was freed.

grpc.aio has no way for a server to reset a stream: neither the end of a handler nor an abort does, since what was
written waits in front of the status for as long as the client keeps its window closed. But gRPC resets the stream of a
call to which nothing refers any more. Two tasks do: the one that runs the handler, and the one that started it and
listens for the client's cancellation. Cancelling both lets go of the call; while a message of it comes in, only once
that has ended, which the end of the connection does at the latest (`channel.SERVER_KEEPALIVE`).

And glibc keeps freed blocks of up to 32 MB for later, in an arena for each thread. What clients made a server hold
would otherwise stay with it: messages in the arenas of gRPC's threads, then pixels in those of the codec's, then
answers, each as much as the bound on all of them together. Where there is no glibc, nothing is done.
"""

from __future__ import annotations

import asyncio
import ctypes
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

REFUSAL_SECONDS = 2.0  # for a client to take a refusal: one that takes nothing from its socket would not even take that
_HANDLER = "_handle_exceptions"  # grpc.aio's coroutine that runs a handler
STEP_BYTES = 64 * 2**20
TRIM_PAUSE = 1.0
_starters: weakref.WeakKeyDictionary[asyncio.Task[Any], asyncio.Task[Any]] = weakref.WeakKeyDictionary()


def remember_starters(loop: asyncio.AbstractEventLoop) -> None:
    """Notes from now on which task of grpc.aio started each handler; without this, `drop` cannot reset streams."""

    def create(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **given: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **given)
        if getattr(coroutine, "__name__", "") == _HANDLER and (starter := asyncio.current_task(loop)) is not None:
            _starters[task] = starter
        return task

    loop.set_task_factory(create)  # type: ignore[arg-type]  # typeshed's protocol has a type variable of its own


def drop_after(seconds: float) -> None:
    """Drops the call that is being handled, with what it has written, unless it ends within so many seconds."""
    timer = drop_timer(seconds)
    _this_call().add_done_callback(lambda _: timer.cancel())


def drop_timer(seconds: float) -> asyncio.TimerHandle:
    """Drops the call that is being handled after so many seconds, unless the timer that it returns is cancelled."""
    return asyncio.get_running_loop().call_later(seconds, _drop, _this_call())


def _this_call() -> asyncio.Task[Any]:
    call = asyncio.current_task()
    assert call is not None, "a handler runs in a task"
    return call


def _drop(call: asyncio.Task[Any]) -> None:
    starter = _starters.get(call)
    if starter is not None:
        starter.cancel()
    call.cancel()


class HeapTrimmer:
    """Trims the heap once `step_bytes` were freed, at most once a second: it takes milliseconds. Lives on one loop."""

    def __init__(self, step_bytes: int) -> None:
        self._step, self._freed = step_bytes, 0
        self._waiting = False
        self._trim: Callable[[int], object] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)

    def freed(self, num_bytes: int) -> None:
        """Counts bytes that were freed, or will be in a moment."""
        self._freed += num_bytes
        if self._freed >= self._step and not self._waiting:
            self._waiting = True
            asyncio.get_running_loop().call_later(TRIM_PAUSE, self._start)

    def _start(self) -> None:
        self._freed, self._waiting = 0, False
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
