"""The batcher between real submitters and a generator: what is computed when and for whom, and how it fails."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
import torch
from painter_server import BAD_SEED, Clock, Painter, hold_device, settle

from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.finite import NotFiniteError
from genssl.server.batching.batcher import Batcher
from genssl.server.batching.jobs import (
    BatchListener,
    BatchReport,
    Caller,
    DeadlinePassedError,
    GenerationFailedError,
    MadeImage,
)
from genssl.server.batching.schedule import Priority, Submitter
from genssl.variants.engine import Row, VariantEngine
from genssl.variants.key import VariantKey

BUCKETS = [1, 4, 16]


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Bench(BatchListener):
    """A batcher with its generator, and what it reported."""

    def __init__(
        self, painter: Painter, deterministic: bool = False, buckets: Sequence[int] = BUCKETS, **settings: Any
    ) -> None:
        self.painter, self.device = painter, ThreadPoolExecutor(1)
        self.engine = VariantEngine(painter, buckets, deterministic=deterministic)
        self.reports: list[BatchReport] = []
        self.drops: list[tuple[int, str]] = []
        self.made: list[tuple[Row, UInt8Array]] = []
        self.told = asyncio.Event()
        self.batcher = Batcher(self.engine, self.device, self, clock=painter.clock, **settings)

    def batch_done(self, report: BatchReport) -> None:
        self.reports.append(report)
        self.told.set()

    def rows_dropped(self, rows: int, reason: str) -> None:
        self.drops.append((rows, reason))
        self.told.set()

    def image_made(self, row: Row, image: UInt8Array) -> None:
        self.made.append((row, image))

    async def idle(self) -> None:
        """Returns once nothing waits or runs."""
        while self.batcher.queued or self.batcher.running:
            self.told.clear()
            await self.told.wait()

    def row(self, seed: int, kind: int = 0) -> Row:
        name = blake2b(f"{seed} {kind}".encode(), digest_size=16).digest()
        settings = self.engine.complete({"kind": kind})
        return Row(name, torch.zeros(4), seed, settings, VariantKey(bytes(16), bytes(16), settings.digest, seed))

    def submit(
        self, seeds: Sequence[int], kind: int = 0, deadline: float | None = None, **who: Any
    ) -> asyncio.Task[list[MadeImage | Exception]]:
        return self.submit_rows([self.row(seed, kind) for seed in seeds], deadline, **who)

    def submit_rows(
        self, rows: Sequence[Row], deadline: float | None = None, **who: Any
    ) -> asyncio.Task[list[MadeImage | Exception]]:
        return asyncio.ensure_future(self.batcher.submit(rows, Caller(Submitter(**who), deadline)))

    async def hold(self) -> asyncio.Task[list[MadeImage | Exception]]:
        """Occupies the device with one row until the gate is opened."""
        return await hold_device(self.painter, lambda: self.submit([250]))

    async def hold_next(self) -> None:
        """Lets go of the batch that is held, and occupies the device with the next one until the gate is opened."""
        self.painter.held.clear()
        self.painter.held_batch = len(self.painter.batches) + 1
        self.painter.gate.set()
        assert await asyncio.to_thread(self.painter.held.wait, 20)


def bench(test: Callable[[Bench], Coroutine[Any, Any, None]], painter: Painter | None = None, **settings: Any) -> Bench:
    """Runs a coroutine on a fresh bench and returns it, so that nothing is left running."""

    async def run() -> Bench:
        made = Bench(painter or Painter(), **settings)
        try:
            await asyncio.wait_for(test(made), 20)
            await asyncio.wait_for(made.idle(), 20)
            assert (made.batcher.queued, made.batcher.running) == (0, 0)
        finally:
            made.painter.gate.set()
            await made.batcher.close()
            made.device.shutdown()
        return made

    return asyncio.run(run())


def greys(results: Sequence[MadeImage | Exception]) -> list[int]:
    assert all(isinstance(result, MadeImage) for result in results), results
    return [int(result.image[0, 0, 0]) for result in results if isinstance(result, MadeImage)]


def test_submitters_share_batches_and_get_their_own_rows():
    async def test(on: Bench) -> None:
        for bucket in BUCKETS:  # else what the batches before it happened to take decides whether the last one is split
            on.batcher.cost.observe((1,), bucket, 0.1)
        held = await on.hold()
        waiting = [on.submit([1, 2, 3]), on.submit([4], client="b"), on.submit([5, 6], kind=1), on.submit([7])]
        await asyncio.sleep(0)
        assert on.batcher.queued == 7
        assert on.batcher.running == 1
        on.painter.clock.advance(0.05)
        on.painter.gate.set()
        assert [greys(await task) for task in waiting] == [[1, 2, 3], [4], [5, 6], [7]]
        assert greys(await held) == [250]

    on = bench(test)
    assert [sorted(set(batch)) for batch in on.painter.batches[1:]] == [[0, 1, 2, 3, 4, 7], [0, 5, 6]]
    assert [(report.bucket, report.rows, report.failed) for report in on.reports] == [
        (1, 1, False),
        (16, 5, False),
        (4, 2, False),
    ]
    assert on.reports[1].queue_waits == pytest.approx([0.05] * 5)


def test_each_row_carries_its_share_of_seconds_and_its_wait(clock):
    async def test(on: Bench) -> None:
        await on.hold()
        task = on.submit([1, 2, 3, 4])
        await asyncio.sleep(0)
        clock.advance(0.05)
        on.painter.gate.set()
        made = await task
        assert on.reports[1].seconds == pytest.approx(0.3 + 4 * 0.1)
        assert [item.seconds for item in made] == pytest.approx([on.reports[1].seconds / 4] * 4)
        before = 0.05 + on.reports[0].bucket * 0.1 + 0.3
        assert [item.queue_seconds for item in made] == pytest.approx([before] * 4)
        assert not any(item.shared for item in made)

    bench(test, Painter(fixed_seconds=0.3, row_seconds=0.1, clock=clock))


def test_urgent_rows_go_first_and_lower_classes_fill_the_batch():
    async def test(on: Bench) -> None:
        await on.hold()
        on.submit(range(100, 120), priority=Priority.BULK)
        on.submit([1, 2], priority=Priority.TRAINING)
        on.submit([50], priority=Priority.INTERACTIVE)
        await asyncio.sleep(0)
        assert on.batcher.queued_by_priority() == {"interactive": 1, "training": 2, "bulk": 20}
        on.painter.gate.set()

    on = bench(test)
    assert on.painter.batches[1] == [50, 1, 2, *range(100, 113)]


def test_old_rows_rise(clock):
    async def test(on: Bench) -> None:
        await on.hold()
        on.submit([1], priority=Priority.BULK)
        await asyncio.sleep(0)
        clock.advance(11.0)
        on.submit(range(100, 116), priority=Priority.TRAINING, client="b")
        await asyncio.sleep(0)
        on.painter.gate.set()

    on = bench(test, Painter(clock=clock), ageing_seconds=10.0)
    assert 1 in on.painter.batches[1]


def test_a_trickle_passes_a_flood():
    async def test(on: Bench) -> None:
        await on.hold()
        on.submit(range(300, 500), client="flood")
        await asyncio.sleep(0)
        on.submit([1, 2], client="trickle")
        await asyncio.sleep(0)
        assert on.batcher.queued == 202
        on.painter.gate.set()

    on = bench(test)
    assert {1, 2} < set(on.painter.batches[1])


def test_equal_rows_are_computed_once_while_they_wait_and_while_they_run():
    async def test(on: Bench) -> None:
        running = await on.hold()
        joined_running = on.submit([250])
        first, second = on.submit([1, 2]), on.submit([2, 3, 2], client="b")
        await asyncio.sleep(0)
        assert on.batcher.queued == 3
        on.painter.gate.set()
        assert greys(await joined_running) == greys(await running) == [250]
        assert greys(await first) == [1, 2]
        assert greys(await second) == [2, 3, 2]
        assert [item.shared for item in await first] == [False, False]
        assert [item.shared for item in await second] == [True, False, True]
        assert (await second)[0].seconds == 0
        assert greys(await on.submit([1])) == [1], "what is finished is computed anew"

    on = bench(test)
    assert [sorted(set(batch) - {0}) for batch in on.painter.batches] == [[250], [1, 2, 3], [1]]


def test_a_shared_row_takes_the_most_urgent_class_and_outlives_its_first_submitter():
    async def test(on: Bench) -> None:
        await on.hold()
        first = on.submit([5], priority=Priority.BULK, client="bulk")
        on.submit(range(100, 120), priority=Priority.TRAINING)
        await asyncio.sleep(0)
        second = on.submit([5], priority=Priority.INTERACTIVE, client="urgent")
        await asyncio.sleep(0)
        assert on.batcher.queued_by_priority() == {"interactive": 1, "training": 20, "bulk": 0}
        first.cancel()
        await settle()
        assert on.drops == []
        on.painter.gate.set()
        assert greys(await second) == [5]

    on = bench(test)
    assert on.painter.batches[1][0] == 5


def test_cancelled_rows_that_wait_are_never_computed():
    async def test(on: Bench) -> None:
        await on.hold()
        gone, stays = on.submit([1, 2, 3]), on.submit([4])
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert on.batcher.queued == 1
        on.painter.gate.set()
        assert greys(await stays) == [4]

    on = bench(test)
    assert on.painter.batches == [[250], [4]]
    assert on.drops == [(3, "cancelled")]


def test_calls_that_are_over_are_let_go_without_waiting_for_the_garbage_to_be_collected(monkeypatch):
    watched: list[weakref.ref[torch.Tensor]] = []

    async def test(on: Bench) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()

        def submit(seeds: Sequence[int], deadline: float | None = None) -> asyncio.Task[list[MadeImage | Exception]]:
            rows = [on.row(seed) for seed in seeds]
            watched.extend(weakref.ref(row.embedding) for row in rows)
            return on.submit_rows(rows, deadline)

        assert greys(await submit([1, 2])) == [1, 2]
        held = await on.hold()
        cancelled, late = submit([3]), submit([4], now + 10)
        await asyncio.sleep(0)
        cancelled.cancel()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "time", lambda: now + 11)
            assert isinstance((await late)[0], DeadlinePassedError)
        on.painter.gate.set()
        await held
        del cancelled, late
        on.made.clear()
        await loop.run_in_executor(on.device, int)  # the device's thread has let go of its last batch
        await settle()
        assert [ref() for ref in watched] == [None] * 4

    gc.disable()
    try:
        bench(test)
    finally:
        gc.enable()


def test_a_running_batch_stops_between_steps_when_nobody_wants_it():
    async def test(on: Bench) -> None:
        held = await on.hold()
        held.cancel()
        await settle()
        again = on.submit([250])
        await settle()
        on.painter.gate.set()
        assert greys(await again) == [250], "it does not join the batch that stops"

    on = bench(test, Painter(steps=5))
    assert on.painter.steps_begun == 1 + 5
    assert on.drops == [(1, "cancelled")]
    assert [(report.rows, report.failed) for report in on.reports] == [(0, False), (1, False)]


def test_what_was_computed_is_handed_over_even_if_its_requester_has_left():
    async def test(on: Bench) -> None:
        await on.hold()
        gone, stays = on.submit([1, 2]), on.submit([3, 4])
        await asyncio.sleep(0)
        await on.hold_next()
        gone.cancel()
        await settle()
        on.painter.gate.set()
        assert greys(await stays) == [3, 4]

    on = bench(test, Painter(steps=2))
    assert on.drops == [(2, "cancelled")]
    made = {row.seed: (row, image) for row, image in on.made}
    assert sorted(made) == [1, 2, 3, 4, 250]
    for seed, (row, image) in made.items():
        assert image[0, 0, 0] == seed
        assert row.key is not None
        assert row.key.index == seed


def test_what_a_shrunk_batch_gave_up_or_what_failed_is_not_handed_over():
    async def test(on: Bench) -> None:
        await on.hold()
        gone, stays = on.submit([1, 2, 3]), on.submit([4])
        await asyncio.sleep(0)
        await on.hold_next()
        gone.cancel()
        await settle()
        on.painter.gate.set()
        assert greys(await stays) == [4]
        assert isinstance((await on.submit([BAD_SEED]))[0], GenerationFailedError)

    on = bench(test, Painter(steps=3))
    assert on.drops == [(3, "cancelled")]
    assert [row.seed for row, _ in on.made] == [250, 4]


def test_an_image_is_one_read_only_copy_that_holds_nothing_else():
    async def test(on: Bench) -> None:
        await on.hold()
        first, second = on.submit([1, 2]), on.submit([2])
        await asyncio.sleep(0)
        on.painter.gate.set()
        images = [result.image for result in await first] + [result.image for result in await second]
        handed_over = {row.seed: image for row, image in on.made}
        assert images[1] is images[2] is handed_over[2]
        for image in images:
            assert image.base is None
            assert not image.flags.writeable

    bench(test)


def test_who_keeps_images_and_fails_does_not_take_the_answers_with_it(caplog, monkeypatch):
    async def test(on: Bench) -> None:
        def full(row: Row, image: UInt8Array) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(on, "image_made", full)
        assert greys(await on.submit([7])) == [7]

    bench(test)
    assert "no space left" in caplog.text


def test_rows_whose_deadline_passed_say_so_and_the_others_go_on(monkeypatch):
    async def test(on: Bench) -> None:
        await on.hold()
        loop = asyncio.get_running_loop()
        now = loop.time()
        late = on.submit([1, 2], deadline=now + 10)
        shared = on.submit([2], deadline=now + 60)
        await asyncio.sleep(0)
        assert on.batcher.queued == 2
        with monkeypatch.context() as patch:
            patch.setattr(loop, "time", lambda: now + 11)
            result = await late
        assert [type(item) for item in result] == [DeadlinePassedError] * 2
        already = on.submit([9], deadline=now - 1)
        assert isinstance((await already)[0], DeadlinePassedError)
        on.painter.gate.set()
        assert greys(await shared) == [2]

    on = bench(test)
    assert on.painter.batches == [[250], [2]]
    assert on.drops == [(1, "deadline"), (1, "deadline")]


def test_a_full_memory_halves_the_bucket_of_its_batch_key_alone(caplog):
    async def test(on: Bench) -> None:
        assert on.batcher.largest_bucket == 16
        assert greys(await on.submit(range(1, 17))) == list(range(1, 17))
        assert on.batcher.largest_bucket == 4
        assert greys(await on.submit(range(20, 32))) == list(range(20, 32))
        assert greys(await on.submit([1, 2], kind=1)) == [1, 2]

    on = bench(test, Painter(memory=5))
    assert [len(batch) for batch in on.painter.batches] == [16, 8, 4, 4, 8, 4, 4, *[4] * 3, 4]
    assert "at most 4 rows from now on" in caplog.text
    assert sum(report.rows for report in on.reports) == 30


def test_a_row_that_does_not_fit_alone_fails():
    async def test(on: Bench) -> None:
        (error,) = await on.submit([1])
        assert isinstance(error, GenerationFailedError)
        assert "on this row alone" in str(error)

    bench(test, Painter(memory=0))


def test_a_full_memory_fails_the_batch_in_deterministic_mode():
    async def test(on: Bench) -> None:
        for error in await on.submit([1, 2]):
            assert isinstance(error, GenerationFailedError)
            assert "lower the largest of `buckets`" in str(error)
        assert on.batcher.largest_bucket == 16

    on = bench(test, Painter(memory=5), deterministic=True)
    assert [len(batch) for batch in on.painter.batches] == [16]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_bad_row_fails_alone(deterministic, caplog):
    async def test(on: Bench) -> None:
        results = await on.submit([*range(1, 8), BAD_SEED, *range(8, 16)])
        assert isinstance(results.pop(7), GenerationFailedError)
        assert greys(results) == list(range(1, 16))
        assert greys(await on.submit([1])) == [1]

    on = bench(test, deterministic=deterministic)
    assert len(on.painter.batches) == 1 + 2 * 4 + 1, "two halves at each of four levels, and the row after it"
    assert sum(report.rows for report in on.reports if report.failed) == 1
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [bool(record.exc_info) for record in errors] == [True] + [False] * 4, "one traceback, and a line a part"
    assert all("cannot paint this one" in record.getMessage() for record in errors)


class Overflowing(Painter):
    """Says of a bad row what its user can do, or what only the server's should read."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def generate(self, embeddings, seeds, parameters, *, alive=None, sizes=()):
        if BAD_SEED in seeds:
            raise self.error
        return super().generate(embeddings, seeds, parameters, alive=alive, sizes=sizes)


def test_an_overflow_and_a_refusal_reach_the_client_and_other_faults_do_not():
    async def said(on: Bench) -> str:
        failed = (await on.submit([1, BAD_SEED, 2]))[1]
        assert isinstance(failed, GenerationFailedError)
        return str(failed)

    async def overflow(on: Bench) -> None:
        assert await said(on) == "float16 overflowed"

    async def bug(on: Bench) -> None:
        assert await said(on) == "the generator failed on this row; see the server's log"

    bench(overflow, Overflowing(NotFiniteError("float16 overflowed")))
    bench(overflow, Overflowing(RequestRefusedError("float16 overflowed")))
    bench(bug, Overflowing(GeneratorError("/srv/models/secret: is not a model")))
    bench(bug, Painter())


class TwiceTroubled(Painter):
    """Has memory for two of the seeds below 9; fails on batches with a larger seed, unless they have two rows."""

    def generate(self, embeddings, seeds, parameters, *, alive=None, sizes=()):
        self.batches.append(list(seeds))
        if len(seeds) > 2:
            raise ValueError("not today") if max(seeds) > 8 else torch.OutOfMemoryError("no room")
        return torch.tensor([[[[seed] * 2] * 2] * 3 for seed in seeds], dtype=torch.uint8)


def test_parts_of_a_failed_batch_respect_what_was_learnt_since():
    async def test(on: Bench) -> None:
        assert greys(await on.submit(range(1, 17))) == list(range(1, 17))
        assert on.batcher.largest_bucket == 2

    on = bench(test, TwiceTroubled())
    second_half = [len(batch) for batch in on.painter.batches if batch[0] == 9]
    assert second_half == [16, 2], "its halves would have had four rows, but by then only two fit"


@pytest.mark.parametrize("where", ["observe", "next_batch"])
def test_an_error_of_the_batcher_itself_fails_what_waits_and_no_more(where, monkeypatch, caplog):
    async def test(on: Bench) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(on.batcher.cost, where, broken)
            for error in await asyncio.wait_for(on.submit([1, 2]), 5):
                assert isinstance(error, GenerationFailedError)
        assert greys(await asyncio.wait_for(on.submit([3]), 5)) == [3]

    bench(test)
    assert "ZeroDivisionError: a bug" in caplog.text


def test_an_idle_device_predicts_from_what_it_measured_lately(monkeypatch):
    async def test(on: Bench) -> None:
        for bucket in BUCKETS:
            on.batcher.cost.observe((0,), bucket, 300.0)
        assert on.batcher.predicted_wait({(0,): 1}, Submitter()) == pytest.approx(300)
        monkeypatch.setattr("genssl.server.batching.batcher.TRUSTED_SECONDS", -1.0)
        assert on.batcher.predicted_wait({(0,): 1}, Submitter()) is None, "too high a one would never be corrected"
        await on.hold()
        assert on.batcher.predicted_wait({(0,): 1}, Submitter()) > 300
        on.painter.gate.set()
        await on.idle()
        await on.submit([1])
        await on.hold()
        assert on.batcher.predicted_wait({(0,): 1}, Submitter()) < 60, "few batches correct it"
        on.painter.gate.set()

    bench(test)


def test_predictions_come_true(clock):
    async def test(on: Bench) -> None:
        assert on.batcher.predicted_wait({(0,): 10}, Submitter()) is None
        for count in (1, 4, 16, 1, 4, 16):
            await on.submit(range(count))
        await on.hold()
        on.submit(range(1000, 1064), priority=Priority.BULK)
        on.submit(range(100, 164))
        await asyncio.sleep(0)
        for_behind = on.batcher.predicted_wait({(0,): 16}, Submitter())
        urgent = on.batcher.predicted_wait({(0,): 1}, Submitter(priority=Priority.INTERACTIVE))
        newcomer = on.batcher.predicted_wait({(0,): 16}, Submitter("newcomer"))
        assert urgent < newcomer < for_behind
        last = on.submit(range(200, 216))
        await asyncio.sleep(0)
        on.painter.gate.set()
        made = await last
        assert made[-1].queue_seconds + sum(item.seconds for item in made) == pytest.approx(for_behind)
        await on.idle()
        await on.hold()
        begun = on.batcher.predicted_wait({(0,): 1}, Submitter())
        clock.advance(0.004)
        assert on.batcher.predicted_wait({(0,): 1}, Submitter()) == pytest.approx(begun - 0.004), (
            "what the running batch took is over"
        )
        on.painter.gate.set()

    bench(test, Painter(fixed_seconds=0.004, row_seconds=0.002, clock=clock))


def test_small_remainders_are_not_padded_where_rows_are_dear():
    async def test(on: Bench) -> None:
        for bucket in BUCKETS:
            on.batcher.cost.observe((0,), bucket, 0.001 + 0.01 * bucket)
        await on.submit([1, 2, 3, 4, 5])

    on = bench(test)
    assert sorted(len(batch) for batch in on.painter.batches) == [1, 4]


def test_the_device_serves_others_between_two_batches():
    async def test(on: Bench) -> None:
        held = await on.hold()
        rows = on.submit(range(64))
        await asyncio.sleep(0)
        other = asyncio.get_running_loop().run_in_executor(on.device, lambda: len(on.painter.batches))
        on.painter.gate.set()
        assert await other <= 2, "an embedding waits for one batch, not for the queue"
        await asyncio.gather(held, rows)

    bench(test)


def test_closing_fails_what_waits_and_stops_what_runs():
    async def test(on: Bench) -> None:
        held = await on.hold()
        waits = on.submit([1])
        await asyncio.sleep(0)
        await on.batcher.close()
        for task in (held, waits, on.submit([2])):
            (error,) = await task
            assert isinstance(error, GenerationFailedError)
            assert "stopping" in str(error)
        on.painter.gate.set()

    on = bench(test, Painter(steps=3))
    assert on.painter.steps_begun == 1


def test_the_builtin_generator_gives_each_of_many_clients_its_variants(unclip, digits_test):
    engine = VariantEngine(unclip, [1, 4, 16, 64])
    embeddings, _ = engine.embed([unclip.preprocess(digits_test.image(row)) for row in range(8)])
    settings = engine.complete({})
    rows = [engine.row(digits_test.source_id(row), embeddings[row], 0, settings) for row in range(8)]

    async def run() -> list[list[MadeImage | Exception]]:
        with ThreadPoolExecutor(1) as device:
            batcher = Batcher(engine, device)
            parts = [rows[start : start + 3] for start in range(6)]
            return await asyncio.gather(
                *(batcher.submit(part, Caller(Submitter(str(i)))) for i, part in enumerate(parts))
            )

    expected, _ = engine.generate(rows)
    for start, results in enumerate(asyncio.run(run())):
        images = np.stack([result.image for result in results])
        assert np.abs(images.astype(int) - expected[start : start + 3]).max() <= 1
