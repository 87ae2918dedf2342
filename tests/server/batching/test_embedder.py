"""Source embeddings on a server: what is computed when and for whom, and how it fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from painter_server import hold_device

from genssl.errors import GeneratorError
from genssl.generators.base import GeneratorSpec
from genssl.server.batching.embedder import Embedder
from genssl.server.batching.jobs import GenerationFailedError
from genssl.server.batching.schedule import Priority, Submitter
from genssl.variants.engine import VariantEngine

BAD = 66
BUCKETS = [1, 4, 16]
Answer = dict[bytes, Any]


class Eye:
    """Embeds a grey image as its grey; can be held, short of memory or broken.

    Attributes:
        gate: embedding waits for it.
        entered: set when a batch has begun.
        batches: the greys of each batch begun, padding included.
    """

    spec = GeneratorSpec("eye", "none", bytes(16), 1, 1, "none", {}, {})

    def __init__(self, memory: int = 10**6) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.memory = memory
        self.batches: list[list[int]] = []

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        greys = [int(image[0, 0, 0]) for image in images]
        self.batches.append(greys)
        self.entered.set()
        assert self.gate.wait(20)
        if len(greys) > self.memory:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        if BAD in greys:
            raise ValueError("cannot look at this one")
        return torch.tensor(greys, dtype=torch.float32)[:, None]


class Bench:
    """An embedder with its conditioner, and what it reported."""

    def __init__(self, eye: Eye, buckets: Sequence[int], deterministic: bool) -> None:
        self.eye, self.device = eye, ThreadPoolExecutor(1)
        self.reports: list[tuple[int, float]] = []
        self.reused = 0
        engine = VariantEngine(eye, buckets, deterministic=deterministic)
        self.embedder = Embedder(engine, self.device, 1000, self)

    def sources_embedded(self, sources: int, seconds: float) -> None:
        self.reports.append((sources, seconds))

    def embedding_reused(self) -> None:
        self.reused += 1

    def embed(self, *greys: int, priority: Priority = Priority.TRAINING) -> asyncio.Task[tuple[Answer, float]]:
        images = {bytes([grey]): np.full((3, 1, 1), grey, dtype=np.uint8) for grey in greys}
        return asyncio.ensure_future(self.embedder.embed(images, Submitter(priority=priority)))

    async def hold(self) -> asyncio.Task[tuple[Answer, float]]:
        """Occupies the device with one source until the gate is opened."""
        return await hold_device(self.eye, lambda: self.embed(250))


def bench(
    test: Callable[[Bench], Coroutine[Any, Any, None]],
    eye: Eye | None = None,
    buckets: Sequence[int] = BUCKETS,
    deterministic: bool = False,
) -> Bench:
    async def run() -> Bench:
        made = Bench(eye or Eye(), buckets, deterministic)
        try:
            await asyncio.wait_for(test(made), 20)
        finally:
            made.eye.gate.set()
            await made.embedder.close()
            made.device.shutdown()
        return made

    return asyncio.run(run())


def greys(answer: tuple[Answer, float]) -> list[int]:
    assert all(isinstance(value, torch.Tensor) for value in answer[0].values()), answer
    assert all(name == bytes([int(value)]) for name, value in answer[0].items())
    return sorted(int(value) for value in answer[0].values())


def test_a_source_is_embedded_once_for_all_who_ask_and_the_others_are_hits():
    async def test(on: Bench) -> None:
        await on.hold()
        first, second, running = on.embed(1, 2), on.embed(2, 3), on.embed(250)
        await asyncio.sleep(0)
        on.eye.gate.set()
        assert [greys(await task) for task in (first, second, running)] == [[1, 2], [2, 3], [250]]
        assert on.reused == 2
        assert (await first)[1] == pytest.approx(2 * (await second)[1]), "who asked first pays"
        assert (await running)[1] == 0
        assert greys(await on.embed(3)) == [3]
        assert on.embedder.get(bytes([1])) == 1
        assert on.embedder.get(bytes([99])) is None
        assert on.reused == 4

    on = bench(test)
    assert on.eye.batches == [[250], [1, 2, 3, 3]]
    assert [sources for sources, _ in on.reports] == [1, 3]


def test_sources_of_a_cancelled_caller_are_dropped_unless_others_want_them():
    async def test(on: Bench) -> None:
        held = await on.hold()
        gone, stays = on.embed(1, 2, 3), on.embed(3, 4)
        await asyncio.sleep(0)
        gone.cancel()
        held.cancel()
        await asyncio.sleep(0)
        on.eye.gate.set()
        assert greys(await stays) == [3, 4]
        assert on.embedder.get(bytes([250])) == 250, "it was on the device already"

    on = bench(test, buckets=[1, 2, 16])
    assert on.eye.batches == [[250], [3, 4]]


def test_urgent_sources_go_first_and_a_shared_one_takes_the_better_class():
    async def test(on: Bench) -> None:
        held = await on.hold()
        tasks = [on.embed(*range(1, 5), priority=Priority.BULK), on.embed(10, 11), on.embed(12, 13)]
        tasks.append(on.embed(20, 4, priority=Priority.INTERACTIVE))
        await asyncio.sleep(0)
        on.eye.gate.set()
        await asyncio.gather(held, *tasks)

    on = bench(test, buckets=[1, 4])
    assert on.eye.batches == [[250], [20, 4, 10, 11], [12, 13, 1, 2], [3]]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_bad_source_fails_alone(deterministic, caplog):
    async def test(on: Bench) -> None:
        answer, seconds = await on.embed(*range(1, 8), BAD, *range(8, 16))
        error = answer.pop(bytes([BAD]))
        assert isinstance(error, GenerationFailedError)
        assert greys((answer, seconds)) == list(range(1, 16))
        assert greys(await on.embed(20)) == [20]

    on = bench(test, deterministic=deterministic)
    assert len(on.eye.batches) == 1 + 2 * 4 + 1, "two halves at each of four levels, and the source after it"
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [bool(record.exc_info) for record in errors] == [True] + [False] * 4, "one traceback, and a line a part"
    assert all("cannot look at this one" in record.getMessage() for record in errors)


class Blinded(Eye):
    """Makes no number of a bad source, as a network of half precision does that overflows."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        made = super().embed(images.clamp(max=BAD - 1))
        made[images[:, 0, 0, 0] == BAD] = float("nan")
        return made


def test_a_source_of_which_the_conditioner_makes_no_number_fails_alone_and_says_why():
    async def test(on: Bench) -> None:
        answer, _ = await on.embed(1, BAD, 2)
        error = answer[bytes([BAD])]
        assert isinstance(error, GenerationFailedError)
        assert "its conditioner: 1 of 1 embeddings hold NaN or infinite numbers." in str(error)
        assert isinstance(answer[bytes([1])], torch.Tensor)
        assert greys(await on.embed(20)) == [20]

    bench(test, Blinded())


class Secretive(Eye):
    """Names a path of the server where it fails."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        if BAD in images[:, 0, 0, 0]:
            raise GeneratorError("/srv/models/secret: is not a model")
        return super().embed(images)


def test_paths_of_the_server_stay_in_its_log(caplog):
    async def test(on: Bench) -> None:
        answer, _ = await on.embed(1, BAD, 2)
        assert str(answer[bytes([BAD])]) == "the conditioner failed on this source; see the server's log"

    bench(test, Secretive())
    assert "/srv/models/secret" in caplog.text


def test_parts_of_a_failed_batch_that_nobody_waits_for_any_more_are_not_tried_again():
    async def test(on: Bench) -> None:
        gone = await hold_device(on.eye, lambda: on.embed(1, 2, 3, BAD))
        gone.cancel()
        await asyncio.sleep(0)
        on.eye.gate.set()
        assert greys(await on.embed(5)) == [5]

    on = bench(test)
    assert on.eye.batches == [[1, 2, 3, BAD], [5]]


def test_a_full_memory_lowers_the_bucket_for_good(caplog):
    async def test(on: Bench) -> None:
        assert greys(await on.embed(*range(1, 11))) == list(range(1, 11))
        assert greys(await on.embed(*range(20, 28))) == list(range(20, 28))

    on = bench(test, Eye(memory=5))
    assert [len(batch) for batch in on.eye.batches] == [16, 4, 4, 4, 4, 4]
    assert "at most 4 sources" in caplog.text


@pytest.mark.parametrize(("deterministic", "message"), [(True, "lower the largest"), (False, "lower the smallest")])
def test_a_full_memory_fails_the_sources_where_no_smaller_batch_is_allowed(deterministic, message):
    async def test(on: Bench) -> None:
        for error in (await on.embed(1, 2))[0].values():
            assert isinstance(error, GenerationFailedError)
            assert f"{message} of `buckets`" in str(error)

    on = bench(test, Eye(memory=3), buckets=[16] if deterministic else [4, 16], deterministic=deterministic)
    assert len(on.eye.batches) == 1


def test_an_error_of_the_embedder_itself_leaves_nobody_waiting(monkeypatch, caplog):
    async def test(on: Bench) -> None:
        await on.hold()
        tasks = [on.embed(1), on.embed(2)]

        def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(on, "sources_embedded", broken)
            on.eye.gate.set()
            for task in tasks:
                assert isinstance(*(await asyncio.wait_for(task, 5))[0].values(), GenerationFailedError)  # type: ignore[call-arg]
        assert greys(await on.embed(3)) == [3]

    bench(test)
    assert "ZeroDivisionError: a bug" in caplog.text


def test_closing_fails_what_waits_and_what_comes_later():
    async def test(on: Bench) -> None:
        held = await on.hold()
        waits = on.embed(1)
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(on.embedder.close())
        for task in (held, waits, on.embed(2)):
            (error,) = (await asyncio.wait_for(task, 5))[0].values()
            assert isinstance(error, GenerationFailedError)
            assert "stopping" in str(error)
        on.eye.gate.set()
        await closing

    bench(test)
