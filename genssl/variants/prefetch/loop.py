"""The one asyncio loop of a process, in a daemon thread, for everything that talks to generation servers.

gRPC's asyncio stack has one poller a process: with a second loop its wake-ups go astray and calls stall. Therefore all
clients and queues of a process share this loop, and none of them may stop it; each keeps its own work in a `Tasks` and
cancels that alone. Imports no torch and no gRPC.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

from genssl.errors import UserError

T = TypeVar("T")
Work = Coroutine[Any, Any, T]

EXIT_SECONDS = 2.0  # how long the end of the process waits for what is still under way
FORK_ADVICE = (
    "gRPC does not survive fork: this process was forked from one with a live connection to a generation server. "
    "Use DataLoader(..., multiprocessing_context='forkserver') or 'spawn' (with multiprocessing itself, "
    "multiprocessing.get_context('forkserver')), or fork before the client is first used"
)


class _Running:
    """The loop of one process and its thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="genssl-background", daemon=True)
        self.thread.start()


_lock = threading.Lock()
_loops: dict[int, _Running] = {}  # by process id; a forked child finds only its parent's, which it must not touch
_channels: weakref.WeakSet[Any] = weakref.WeakSet()  # of gRPC's asyncio stack, on whatever loop
_channel_opened = False  # closing them all does not take gRPC's threads back
_inherited: list[Any] = []  # a forked child must not even free its parent's channels
_forked = False


def _mark_forked() -> None:
    """Runs in every forked child, which has none of its parent's threads."""
    global _forked, _lock
    _lock = threading.Lock()  # another thread may have held it at the moment of the fork
    _inherited.extend(_channels)
    _forked = _forked or bool(_loops) or _channel_opened


os.register_at_fork(after_in_child=_mark_forked)


def note_channel(channel: Any) -> None:
    """Notes that this process has a channel of gRPC's asyncio stack, on whatever loop, which no fork survives."""
    global _channel_opened
    _channel_opened = True
    _channels.add(channel)


def was_forked_from_live() -> bool:
    """Says whether this process was forked from one with a live loop or channel, so that gRPC must not be used here."""
    return _forked


def refuse_after_fork(*, allow_fork: bool = False) -> None:
    """Raises UserError in a process that was forked from one with a live loop or channel, unless that is allowed."""
    if _forked and not allow_fork:
        raise UserError(FORK_ADVICE)


def background_loop(*, allow_fork: bool = False) -> asyncio.AbstractEventLoop:
    """Returns this process's loop, starting it on first use.

    Raises UserError in a process that was forked from one where the loop was live, unless `allow_fork` gives it a loop
    of its own all the same, with which gRPC may crash or hang. Children by `forkserver` and `spawn` get one.
    """
    refuse_after_fork(allow_fork=allow_fork)
    with _lock:
        running = _loops.get(os.getpid())
        if running is None:
            running = _loops[os.getpid()] = _Running()
    return running.loop


def _start(
    work: Work[T], tasks: set[asyncio.Task[Any]], loop: asyncio.AbstractEventLoop
) -> concurrent.futures.Future[T]:
    """Like asyncio.run_coroutine_threadsafe, with the task in `tasks` until it has ended."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def begin() -> None:
        task = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(end)
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(task.cancel) if done.cancelled() else None)

    def end(task: asyncio.Task[T]) -> None:
        tasks.discard(task)
        if task.cancelled():
            future.cancel()
        error = None if task.cancelled() else task.exception()  # asked for, so that asyncio does not log it as lost
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    loop.call_soon_threadsafe(begin)
    return future


def _wait(future: concurrent.futures.Future[T], timeout: float | None) -> T:
    running = _loops.get(os.getpid())
    assert running is None or threading.current_thread() is not running.thread, "the loop would wait for itself"
    try:
        return future.result(timeout)
    except BaseException:
        future.cancel()  # after a timeout or Ctrl-C; without effect on what has ended
        raise


class Tasks:
    """The work that one user of the shared loop has under way, so that it can end its own and nobody else's.

    Thread-safe. Bound to the process in which it is first used.
    """

    def __init__(self, *, allow_fork: bool = False) -> None:
        self._allow_fork, self._closed = allow_fork, False
        self._lock = threading.Lock()  # nothing starts between the cancelling and the teardown
        self._tasks: set[asyncio.Task[Any]] = set()  # touched on the loop only

    def start(self, work: Work[T]) -> concurrent.futures.Future[T]:
        """Starts a coroutine on the loop from any thread; the future's `cancel` cancels it.

        Raises RuntimeError after `close`, and UserError as `background_loop`.
        """
        try:
            loop = background_loop(allow_fork=self._allow_fork)
            with self._lock:
                if self._closed:
                    raise RuntimeError("this was closed; make a new one")
                return _start(work, self._tasks, loop)
        except BaseException:
            work.close()  # otherwise Python warns of a coroutine that was never awaited
            raise

    def run(self, work: Work[T], timeout: float | None = None) -> T:
        """Runs a coroutine on the loop and returns its result; must not be called on the loop.

        The coroutine is cancelled if the wait ends before it does: after `timeout` seconds, with TimeoutError, or by
        Ctrl-C. Raises CancelledError if `close` ended it, and what `start` raises.
        """
        return _wait(self.start(work), timeout)

    def close(self, teardown: Work[None] | None = None, *, timeout: float = 5.0) -> None:
        """Cancels what was started here and waits for its end, then runs `teardown`, such as closing a channel.

        The loop goes on; what still runs after `timeout` seconds is left to itself, cancelled. A second call, and one
        in a forked child, do nothing.
        """
        running = _loops.get(os.getpid())
        if self._closed or running is None:
            self._closed = True
            if teardown is not None:
                teardown.close()
            return
        with self._lock:
            self._closed = True
            future = _start(self._end(teardown), set(), running.loop)
        concurrent.futures.wait([future], timeout)
        if not future.cancel():
            future.result()

    async def _end(self, teardown: Work[None] | None) -> None:
        # Everything started before `close` is in the set by now: the loop takes what threads hand it in order.
        mine = list(self._tasks)
        for task in mine:
            task.cancel()
        try:
            await asyncio.gather(*mine, return_exceptions=True)
        finally:
            if teardown is not None:
                await teardown


_shared = Tasks()


def run(work: Work[T], timeout: float | None = None) -> T:
    """Runs a coroutine on the loop and returns its result, for what needs no `close`; raises as `Tasks.run`."""
    return _shared.run(work, timeout)


def _end_at_exit() -> None:
    """Cancels what nobody closed, so that the interpreter does not end under running calls."""
    running = _loops.get(os.getpid())
    if running is None:
        return

    async def cancel_all() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    concurrent.futures.wait([_start(cancel_all(), set(), running.loop)], EXIT_SECONDS)
    running.loop.call_soon_threadsafe(running.loop.stop)
    running.thread.join(EXIT_SECONDS)


atexit.register(_end_at_exit)
