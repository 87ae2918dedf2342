"""Threads that decode and encode images, a small piece of a request at a time, whose turns go round as rows' do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from genssl.server.batching.schedule import Priority
from genssl.server.batching.turns import Turns

# Small images share a task: handing one over takes as long as decoding a thousand pixels or so.
TASK_PIXELS = 2**18
RISING_AT_ONCE = 64  # tasks, in one call
# What each image costs beside its pixels, in pixels.
IMAGE_PIXELS = 1024

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Turn:
    """Who waits, and how urgently.

    Attributes:
        holder: the token's name or the host; holders take turns first, their clients second.
        client: of this holder.
        priority: the better class goes first.
    """

    holder: str
    client: str
    priority: Priority


@dataclass(slots=True, eq=False)
class _Task:
    function: Callable[[], Any] | None  # None once it has ended: a dead task in the queue must not hold images
    cost: int
    turn: Turn
    lane: Priority
    since: float
    answer: asyncio.Future[Any] = field(repr=False)


class CodecPool:
    """Runs the codec's tasks. Lives on one event loop.

    Args:
        executor: runs them.
        threads: how many may run at once.
        most_pixels: how many may be worked on at once; a larger task runs alone.
        ageing_seconds: a task that has waited so long rises by one class, and again after each further such time.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        threads: int,
        most_pixels: int,
        ageing_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor, self._threads, self._most_pixels = executor, threads, most_pixels
        self._ageing_seconds, self._clock = ageing_seconds, clock
        self._lanes: dict[Priority, Turns[_Task]] = {priority: Turns() for priority in Priority}
        self._arrivals: dict[Priority, dict[_Task, None]] = {priority: {} for priority in Priority}
        self._running = self._pixels = 0

    async def map(
        self, turn: Turn, function: Callable[[Item], Result], items: Sequence[Item], pixels: Sequence[int]
    ) -> list[Result]:
        """Returns the function's results in order; what has not begun when the caller is cancelled never does.

        Args:
            turn: whose turns the tasks take.
            function: runs in a thread, on one item after another.
            items: to work on.
            pixels: of each item: what it costs, and what counts towards those worked on at once.
        """
        parts: list[list[Item]] = []
        costs: list[int] = []
        for item, count in zip(items, pixels, strict=True):
            cost = count + IMAGE_PIXELS
            if not parts or costs[-1] + cost > TASK_PIXELS:
                parts.append([])
                costs.append(0)
            parts[-1].append(item)
            costs[-1] += cost
        answers = [
            self._add(turn, partial(_each, function, part), cost) for part, cost in zip(parts, costs, strict=True)
        ]
        self._start()
        return [result for part in await asyncio.gather(*answers) for result in part]

    def _add(self, turn: Turn, function: Callable[[], Any], cost: int) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        task = _Task(function, cost, turn, turn.priority, self._clock(), answer)
        answer.add_done_callback(lambda _: self._leave(task))
        self._enter(task)
        return answer

    def _enter(self, task: _Task) -> None:
        self._lanes[task.lane].add(task.turn.holder, task.turn.client, task)
        self._arrivals[task.lane][task] = None

    def _leave(self, task: _Task) -> None:
        task.function = None
        self._arrivals[task.lane].pop(task, None)

    def _start(self) -> None:
        """Starts tasks, in their turn, while there is room."""
        while self._running < self._threads and (task := self._take()):
            assert task.function is not None, "it was wanted a moment ago"
            self._running += 1
            self._pixels += task.cost
            running = asyncio.get_running_loop().run_in_executor(self._executor, task.function)
            running.add_done_callback(partial(self._ended, task))

    def _take(self) -> _Task | None:
        """Takes out the task that goes next; one for which there is no room lets smaller ones of others pass."""
        self._age()
        for lane, turns in self._lanes.items():
            while taken := turns.take(lambda task, lane=lane: self._gone(task, lane) or self._fits(task)):  # type: ignore[misc]
                holder, client, task = taken
                if not self._gone(task, lane):
                    turns.charge(holder, client, task.cost)
                    del self._arrivals[lane][task]
                    return task
        return None

    def _gone(self, task: _Task, lane: Priority) -> bool:
        return task.function is None or task.lane != lane

    def _fits(self, task: _Task) -> bool:
        return not self._running or self._pixels + task.cost <= self._most_pixels

    def _age(self) -> None:
        now = self._clock()
        for lane in (Priority.TRAINING, Priority.BULK):
            for task in list(islice(self._arrivals[lane], RISING_AT_ONCE)):
                if task.since + self._ageing_seconds > now:
                    break
                del self._arrivals[lane][task]
                task.lane, task.since = Priority(lane - 1), now
                self._enter(task)  # it stays in its old place too, where it is passed over

    def _ended(self, task: _Task, running: asyncio.Future[Any]) -> None:
        self._running -= 1
        self._pixels -= task.cost
        if not task.answer.done():
            if running.cancelled():
                task.answer.cancel()
            elif error := running.exception():
                task.answer.set_exception(error)
            else:
                task.answer.set_result(running.result())
        elif not running.cancelled():
            running.exception()  # nobody is there to be told
        self._start()


def _each(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]
