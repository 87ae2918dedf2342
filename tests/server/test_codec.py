"""Decoding and encoding take turns, by pixels, between holders, clients and priorities; the executor is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from genssl.server.batching.schedule import Priority, Submitter
from genssl.server.codec import IMAGE_PIXELS, TASK_PIXELS, CodecPool

LARGE = 16_000_000


class ByHand(Executor):
    """Runs what it was given when it is told to, the oldest first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: function(*args, **kwargs)))
        return future

    def step(self) -> None:
        future, function = self.waiting.pop(0)
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


class Bench:
    def __init__(self, threads: int, most_pixels: int) -> None:
        self.executor, self.done, self.now = ByHand(), list[str](), 0.0
        self.pool = CodecPool(
            self.executor, threads=threads, most_pixels=most_pixels, ageing_seconds=10.0, clock=lambda: self.now
        )

    async def ask(
        self, client: str, count: int, pixels: int, priority: Priority = Priority.TRAINING, holder: str = ""
    ) -> asyncio.Task[list[str]]:
        def work(name: str) -> str:
            self.done.append(name)
            return name

        names = [f"{client}{number}" for number in range(count)]
        submitter = Submitter(client, priority, holder or client)
        asked = asyncio.ensure_future(self.pool.map(submitter, work, names, [pixels] * count))
        await self.settle()
        return asked

    async def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.executor.step()
            await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def bench(test: Callable[[Bench], Coroutine[Any, Any, None]], threads: int = 2, most_pixels: int = LARGE) -> None:
    asyncio.run(asyncio.wait_for(test(Bench(threads, most_pixels)), 20))


def test_a_tiny_image_waits_for_a_few_of_anothers_four_hundred_large_ones():
    async def test(on: Bench) -> None:
        large = await on.ask("a", 400, LARGE)
        await on.step(3)
        tiny = await on.ask("b", 1, 1024)
        await on.step(3)
        assert tiny.done()
        assert len(on.done) <= 6
        large.cancel()

    bench(test)


def test_a_tiny_image_is_decoded_beside_a_large_one():
    async def test(on: Bench) -> None:
        large = await on.ask("a", 400, LARGE)
        tiny = await on.ask("b", 1, 1024)
        assert len(on.executor.waiting) == 2, "one of the large ones, for more there is no room, and the tiny one"
        on.executor.waiting.reverse()
        await on.step()
        assert on.done == ["b0"]
        assert tiny.done()
        large.cancel()

    bench(test, most_pixels=LARGE + TASK_PIXELS)


def test_a_holder_of_many_clients_gets_no_more_than_one_of_few():
    async def test(on: Bench) -> None:
        crowd = [await on.ask(f"c{number}-", 10, LARGE, holder="crowd") for number in range(10)]
        one = await on.ask("one", 5, LARGE)
        await on.step(12)
        assert one.done()
        for asked in crowd:
            asked.cancel()

    bench(test)


def test_turns_are_shared_by_pixels():
    async def test(on: Bench) -> None:
        large, small = await on.ask("large", 40, 4 * TASK_PIXELS), await on.ask("small", 40, TASK_PIXELS)
        await on.step(25)
        counts = [sum(name.startswith(client) for name in on.done) for client in ("large", "small")]
        assert 3 * counts[0] <= counts[1] <= 5 * counts[0]
        large.cancel()
        small.cancel()

    bench(test, threads=1, most_pixels=10**9)


def test_the_better_class_goes_first_until_the_other_has_waited_long():
    async def test(on: Bench) -> None:
        bulk = await on.ask("bulk", 3, LARGE, Priority.BULK)
        urgent = await on.ask("urgent", 30, LARGE, Priority.INTERACTIVE)
        await on.step(4)
        assert on.done == ["bulk0", "urgent0", "urgent1", "urgent2"]
        on.now = 11.0
        await on.step(2)
        on.now = 22.0
        await on.step(4)
        assert "bulk1" in on.done, "it has risen by two classes"
        while not bulk.done():
            await on.step()
        assert sorted(await bulk) == ["bulk0", "bulk1", "bulk2"]
        urgent.cancel()

    bench(test, threads=1)


def test_only_so_many_pixels_are_worked_on_at_once_and_a_larger_image_alone():
    async def test(on: Bench) -> None:
        asked = await on.ask("a", 6, 400_000)
        assert len(on.executor.waiting) == 2
        await on.step(6)
        assert await asked == [f"a{number}" for number in range(6)]
        huge = await on.ask("huge", 2, 5_000_000)
        assert len(on.executor.waiting) == 1
        await on.step(2)
        assert await huge == ["huge0", "huge1"]

    bench(test, threads=4, most_pixels=1_000_000)


def test_small_images_share_a_task_and_come_back_in_order():
    async def test(on: Bench) -> None:
        asked = await on.ask("a", 300, 64)
        tasks = 0
        while on.executor.waiting:
            tasks += 1
            await on.step()
        assert await asked == [f"a{number}" for number in range(300)]
        assert tasks == -(-300 // (TASK_PIXELS // (64 + IMAGE_PIXELS)))

    bench(test)


def test_what_a_cancelled_caller_waited_for_is_never_begun_and_is_let_go():
    async def test(on: Bench) -> None:
        gone, stays = await on.ask("a", 100, LARGE), await on.ask("b", 2, LARGE)
        gone.cancel()
        await on.settle()
        await on.step(3)
        assert on.done == ["a0", "b0", "b1"]
        assert await stays == ["b0", "b1"]
        assert not on.executor.waiting
        assert not any(on.pool._arrivals.values())

    bench(test)


def test_an_error_is_the_callers_and_the_pool_goes_on():
    async def test(on: Bench) -> None:
        def fail(name: str) -> str:
            raise ValueError(name)

        submitter = Submitter("a", holder="a")
        bad = asyncio.ensure_future(on.pool.map(submitter, fail, ["x", "y"], [LARGE, LARGE]))
        good = await on.ask("b", 1, 10)
        await on.step(3)
        with pytest.raises(ValueError, match="x"):
            await bad
        assert await good == ["b0"]

    bench(test)
