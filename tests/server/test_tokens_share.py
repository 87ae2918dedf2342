"""What the holder of a token can take from others by the names and classes that it claims, and what it is charged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import pytest
from painter_server import Serving, serving

from genssl.generation.v1 import generation_pb2 as pb

A, B = "a" * 32, "b" * 32
ROWS = 64


def run(
    monkeypatch: pytest.MonkeyPatch,
    test: Callable[[Serving], Coroutine[Any, Any, None]],
    of_a: str = "",
    more: str = "",
) -> None:
    """Runs a test on a server of two tokens; `of_a` is what A's may take, and `more` lines of the server's file."""
    monkeypatch.setenv("A_TOKEN", A)
    monkeypatch.setenv("B_TOKEN", B)
    tokens = f"tokens: [{{name: A, env: A_TOKEN{of_a}}}, {{name: B, env: B_TOKEN}}]"

    async def on_server() -> None:
        async with serving(f"{tokens}\n{more}") as on:
            await asyncio.wait_for(test(on), 30)

    asyncio.run(on_server())


def shares_of_b(on: Serving) -> float:
    """Returns B's part of the full batches while both had rows waiting."""
    batches = [batch for batch in on.painter.shades[1:] if 2 in batch and 1 in batch]
    assert sum(map(len, batches)) >= ROWS
    return sum(batch.count(2) for batch in batches) / sum(map(len, batches))


@pytest.mark.parametrize(("names", "priority"), [(16, pb.PRIORITY_TRAINING), (4, pb.PRIORITY_INTERACTIVE)])
def test_two_tokens_have_half_of_the_device_each(monkeypatch, names, priority):
    """Whatever number of names one of them has, and though it claims to be urgent, which nobody has granted it."""

    async def test(on: Serving) -> None:
        held = await on.hold(token=B)
        calls = [
            on.ask(name * ROWS, ROWS, token=A, client_id=f"n{name}", priority=priority, parameters={"shade": 1})
            for name in range(names)
        ]
        calls.append(on.ask(10**5, ROWS, token=B, parameters={"shade": 2}))
        await on.until(lambda: on.hosted.batcher.queued == (names + 1) * ROWS)
        on.painter.gate.set()
        await asyncio.gather(held, *calls)
        assert shares_of_b(on) == pytest.approx(0.5, abs=0.05)

    run(monkeypatch, test)


def test_a_class_that_was_granted_is_kept_and_one_that_was_not_is_lowered(monkeypatch):
    async def test(on: Serving) -> None:
        held = await on.hold(token=B)
        urgent = {"priority": pb.PRIORITY_INTERACTIVE}
        calls = [on.ask(0, 3, token=A, **urgent), on.ask(100, 5, token=B, **urgent)]
        await on.until(lambda: on.hosted.batcher.queued == 8)
        assert on.hosted.batcher.queued_by_priority() == {"interactive": 3, "training": 5, "bulk": 0}
        on.painter.gate.set()
        await asyncio.gather(held, *calls)

    run(monkeypatch, test, ", highest_priority: interactive")


# A's rate is 8 variants at once, and in a test's time no more.
RATE, LARGEST = ", max_variants_per_second: 0.001", "limits: {max_variants_per_request: 8}"


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


def test_what_expired_in_the_queue_is_not_charged(monkeypatch):
    async def test(on: Serving) -> None:
        held = await on.hold(token=B)
        code, _ = await refused(on.ask(0, 8, token=A, timeout=0.3))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        await on.until(lambda: on.hosted.batcher.queued == 0)
        again = on.ask(0, 8, token=A)
        await on.until(lambda: on.hosted.batcher.queued == 8)
        on.painter.gate.set()
        await asyncio.gather(held, again)
        code, said = await refused(on.ask(100, 1, token=A))
        assert (code, "variants a second" in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True), "what was made is"

    run(monkeypatch, test, RATE, LARGEST)


def test_what_was_cancelled_in_the_queue_is_not_charged(monkeypatch):
    async def test(on: Serving) -> None:
        held = await on.hold(token=B)
        for _ in range(3):
            call = on.ask(0, 8, token=A)
            await on.until(lambda: on.hosted.batcher.queued == 8)
            call.cancel()
            await on.until(lambda: on.hosted.batcher.queued == 0)
        on.painter.gate.set()
        await held

    run(monkeypatch, test, RATE, LARGEST)


def test_what_came_to_the_device_is_charged_though_its_client_hung_up(monkeypatch):
    async def test(on: Serving) -> None:
        on.painter.gate.clear()
        call = on.ask(0, 5, token=A)
        await on.until(on.painter.entered.is_set)
        call.cancel()
        await on.until(lambda: not on.statistics.waiting)
        on.painter.gate.set()
        code, _ = await refused(on.ask(100, 4, token=A))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        await on.ask(100, 3, token=A)

    run(monkeypatch, test, RATE, LARGEST)


def test_what_a_fault_of_the_servers_own_kept_from_being_made_is_not_charged(monkeypatch):
    async def test(on: Serving) -> None:
        async def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(on.hosted, "make", broken)
            code, _ = await refused(on.ask(0, 8, token=A))
            assert code == grpc.StatusCode.UNKNOWN
        await on.ask(0, 8, token=A)

    run(monkeypatch, test, RATE, LARGEST)
