"""What a request costs the event loop is bounded by its own rows, whatever else waits: counted, not timed."""

from __future__ import annotations

import asyncio
import difflib
import threading
import time
from collections import Counter
from typing import Any

import grpc
import pytest
import torch
from painter_server import SOURCE, Serving, serving

from genssl.errors import suggest
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.server.batching.cost import CostModel
from genssl.server.batching.jobs import Caller
from genssl.server.batching.schedule import Priority, Schedule, Submitter, Waiting
from genssl.server.guard import RefusedError

KINDS = 200
REFRESHED = 32  # keys that are priced anew at each question, besides its own


def check_in_time(on: Serving, kinds: range, seconds: float) -> None:
    """Asks whether a request for one variant of each kind would be ready in time."""
    specs = [pb.VariantSpec(variant_index=kind, parameters={"kind": kind}) for kind in kinds]
    request = pb.GenerateVariantsRequest(variants=specs, sources=[pb.SourceImage(digest=SOURCE.source_id)])
    plan = on.hosted.plan(request, on.hosted.engine.complete({}))
    assert len(plan.left) == len(kinds)
    deadline = asyncio.get_running_loop().time() + seconds
    on.service._check_in_time(on.hosted, plan, Caller(Submitter("c"), deadline))


def test_predicting_a_request_prices_its_own_keys_and_not_all_that_wait(monkeypatch):
    asked = Counter[str]()
    predict = CostModel.predict

    def counted(self: CostModel, *arguments: Any) -> float | None:
        asked["predictions"] += 1
        return predict(self, *arguments)

    async def test() -> None:
        async with serving() as on:
            on.hosted.batcher.cost.observe((0,), 1, 1e-6)
            held = await on.hold()
            specs = [pb.VariantSpec(variant_index=kind, parameters={"kind": kind}) for kind in range(1, KINDS)]
            waiting = on.ask(0, 0, variants=specs)
            await on.until(lambda: on.hosted.batcher.queued == KINDS - 1)
            monkeypatch.setattr(CostModel, "predict", counted)
            for kinds in (range(1), range(KINDS)):
                asked.clear()
                check_in_time(on, kinds, 600.0)
                assert asked["predictions"] <= len(kinds) + len(Priority) * REFRESHED
            asked.clear()
            more = on.ask(0, 0, variants=[pb.VariantSpec(variant_index=10**3 + kind) for kind in range(KINDS)])
            await on.until(lambda: on.hosted.batcher.queued == 2 * KINDS - 1)
            assert asked["predictions"] <= len(Priority) * (KINDS + REFRESHED), "nor does it when it enters"
            on.painter.gate.set()
            await asyncio.gather(held, waiting, more)

    asyncio.run(test())


def test_the_waits_of_several_keys_add_up():
    async def test() -> None:
        async with serving() as on:
            for kind in range(10):
                for bucket in on.hosted.engine.buckets:
                    on.hosted.batcher.cost.observe((kind,), bucket, 1.0)
            assert on.hosted.batcher.predicted_wait({(kind,): 1 for kind in range(10)}, Submitter()) == pytest.approx(
                10.0
            )
            check_in_time(on, range(10), 10.5)
            with pytest.raises(RefusedError, match="would be ready in"):
                check_in_time(on, range(10), 9.5)

    asyncio.run(test())


def test_a_request_with_many_keys_and_a_short_deadline_is_refused_over_the_wire():
    """Ten batches of a second each are not ready in five, though each of them alone is."""

    async def test() -> None:
        async with serving() as on:
            for kind in range(10):
                for bucket in on.hosted.engine.buckets:
                    on.hosted.batcher.cost.observe((kind,), bucket, 1.0)
            specs = [pb.VariantSpec(variant_index=kind, parameters={"kind": kind}) for kind in range(10)]
            with pytest.raises(grpc.aio.AioRpcError, match=r"would be ready in 10\.00 s"):
                await on.ask(0, 0, variants=specs, timeout=5)

    asyncio.run(test())


class Name(str):
    """A client's name that counts how often it is looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        Name.looked_up += 1
        return super().__hash__()


def test_choosing_a_key_does_not_look_at_the_others():
    def lookups(keys: int) -> int:
        schedule: Schedule[Waiting] = Schedule(10)
        for number in range(keys):
            schedule.add(Waiting(number, Submitter(Name("one"))), 0.0)
        Name.looked_up = 0
        for _ in range(10):
            schedule.take(schedule.next_key(0.0), 1)
        return Name.looked_up

    assert lookups(1000) == lookups(50)


class Class(int):
    """A priority that counts how often it is compared."""

    compared = 0

    def __lt__(self, other: int) -> bool:
        Class.compared += 1
        return super().__lt__(other)

    def __eq__(self, other: object) -> bool:
        Class.compared += 1
        return super().__eq__(other)

    __hash__ = int.__hash__


def test_many_requests_for_the_same_rows_join_and_leave_at_a_cost_of_their_own():
    """Each in the time of its own rows, and not of those who wait for them already."""

    async def comparisons(requests: int) -> float:
        async with serving() as on:
            held = await on.hold()
            engine, batcher = on.hosted.engine, on.hosted.batcher
            rows = [engine.row(bytes(16), torch.zeros(4), index, engine.complete({})) for index in range(4)]
            Class.compared = 0
            calls = [
                asyncio.ensure_future(batcher.submit(rows, Caller(Submitter(f"c{number}", Class(2)))))
                for number in range(requests)
            ]
            await asyncio.sleep(0)
            assert batcher.queued == 4
            for call in calls[:-1]:  # the first first, so that the turn passes on every time
                call.cancel()
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert batcher.queued == 4, "the last still waits"
            on.painter.gate.set()
            await asyncio.gather(held, calls[-1])
            return Class.compared / requests

    few, many = asyncio.run(comparisons(32)), asyncio.run(comparisons(1024))
    assert many < 4 * few, "more by the logarithm of a heap's size"


def test_a_nearest_name_is_looked_for_to_a_name_of_a_persons_length(monkeypatch):
    asked: list[int] = []
    nearest = difflib.get_close_matches

    def counted(word: str, *arguments: Any, **settings: Any) -> list[str]:
        asked.append(len(word))
        return nearest(word, *arguments, **settings)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    assert "did you mean 'guidance_scale'" in suggest("guidance_scal", ["guidance_scale"])
    assert "allowed: guidance_scale" in suggest("g" * 10**6, ["guidance_scale"])
    assert max(asked) <= 100


@pytest.mark.slow
def test_health_checks_are_answered_while_two_requests_of_1024_keys_wait(start_server, tmp_path, digits_test):
    """Of either kind: guidance intervals, which share batches, and steps and sizes, which do not."""
    with start_server(tmp_path, "drain_seconds=0") as server, grpc.insecure_channel(server.address) as channel:
        server.wait_until_serving()
        stub = pb_grpc.GenerationServiceStub(channel)
        stored = digits_test.stored(0)
        source = pb.SourceImage(
            digest=stored.source_id,
            data=stored.data,
            encoding=pb.IMAGE_ENCODING_RAW,
            channels=stored.channels,
            height=stored.height,
            width=stored.width,
        )

        def ask(client: str, parameters: list[dict[str, float]]) -> Any:
            specs = [pb.VariantSpec(variant_index=number, parameters=one) for number, one in enumerate(parameters)]
            request = pb.GenerateVariantsRequest(
                generator_id="stable_unclip", sources=[source], variants=specs, client_id=client
            )
            return stub.GenerateVariants.future(request, timeout=600)

        waits: list[float] = []
        done = threading.Event()

        def probe() -> None:
            while not done.is_set():
                started = time.monotonic()
                server.health()
                waits.append(time.monotonic() - started)

        prober = threading.Thread(target=probe)
        prober.start()
        intervals = [{"guidance_start": number / 1024, "guidance_scale": 4.0} for number in range(1024)]
        kinds = [{"num_inference_steps": 1 + n % 41, "output_size": 8 + n // 41} for n in range(1024)]
        calls = [ask("a", intervals), ask("b", kinds), ask("c", intervals[::-1]), ask("d", kinds[::-1])]
        time.sleep(8)
        done.set()
        prober.join()
        for call in calls:
            call.cancel()
        assert max(waits) < 5, "26 s when every key looked at every other"
        assert len(waits) > 5
