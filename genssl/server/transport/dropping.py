"""Drops a call whose client does not read its answer.

grpc.aio has no way for a server to reset a stream: neither the end of a handler nor an abort does, since what was
written waits in front of the status for as long as the client keeps its window closed. But gRPC resets the stream of a
call to which nothing refers any more. Two tasks do: the one that runs the handler, and the one that started it and
listens for the client's cancellation. Cancelling both lets go of the call; while a message of it comes in, only once
that has ended, which the end of the connection does at the latest (`channel.SERVER_KEEPALIVE`).
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Coroutine
from typing import Any

REFUSAL_SECONDS = 2.0  # for a client to take a refusal: one that takes nothing from its socket would not even take that
_HANDLER = "_handle_exceptions"  # grpc.aio's coroutine that runs a handler
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
