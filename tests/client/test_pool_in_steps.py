"""The remote source and its pool over many steps: what the pool held when a step was announced, the step gets."""

from __future__ import annotations

import asyncio
import time
from collections import deque

import numpy as np
import pytest

from genssl.client.source import RemoteSource, ServerFetcher
from genssl.config.recipe import VariantsConfig
from genssl.generation.v1 import generation_pb2 as pb
from genssl.variants.ledger import Ledger
from genssl.variants.plan import ViewPlan
from genssl.variants.prefetch.pool import PoolError, VariantPool
from genssl.variants.source import VariantRequest
from genssl.variants.store.facts import GeneratorFacts
from genssl.variants.store.source import StoredVariants
from genssl.variants.store.store import VariantStore

SOURCES, BATCH, PER_IMAGE, AHEAD, EPOCHS = 100, 10, 4, 4, 12
SIDE = 8
SLOT = 3 * SIDE * SIDE


class WiredFetcher(ServerFetcher):
    """Has, in place of the wire, a server that answers at once."""

    fetched = 0

    async def connect(self, generator_id) -> None:
        self.generator = pb.GeneratorInfo(image_size=SIDE)

    def most_rows(self, image_size: int) -> int:
        return 64

    async def fetch(self, requests, *, ahead=False):
        self.fetched += len(requests)
        return [(np.full((3, SIDE, SIDE), request.index, np.uint8), "generated") for request in requests]


@pytest.fixture
def open_source(monkeypatch):
    monkeypatch.setattr("genssl.client.source.ServerFetcher", WiredFetcher)
    return lambda max_bytes: RemoteSource(
        targets=["nowhere:1"],
        generator_id="any",
        parameters={},
        dataset=None,
        config=VariantsConfig(late="reuse"),
        ledger=Ledger(),
        pool=VariantPool(None, max_bytes=max_bytes, max_reuse=10),
    )


def requests(numbers, index: int = 0) -> list[VariantRequest]:
    return [VariantRequest(row=number, source_id=bytes([number] * 16), index=index) for number in numbers]


def settle(source: RemoteSource) -> None:
    """Waits until all that was asked for is in the pool."""
    deadline = time.monotonic() + 10
    while source._queue._in_flight or not source._queue.idle:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.parametrize("slots", [300, 100, 25], ids=["most fit", "a quarter fits", "fewer than are announced"])
def test_with_an_idle_server_every_variant_is_the_planned_one(open_source, slots):
    plan = ViewPlan(
        seed=0, num_sources=SOURCES, batch_size=BATCH, policy="second", probability=1.0, per_image=PER_IMAGE
    )
    source = open_source(slots * SLOT)
    coming: deque[list[VariantRequest]] = deque()
    origins: list[str] = []
    taken = 0
    try:
        for step in range(EPOCHS * plan.steps_per_epoch):
            planned = plan.step(*divmod(step, plan.steps_per_epoch))
            coming.append(
                [
                    VariantRequest(int(row), bytes([row] * 16), int(index[1]))
                    for row, index in zip(planned.rows, planned.indices, strict=True)
                ]
            )
            source.announce(coming[-1], step)
            settle(source)
            if len(coming) > AHEAD:
                wanted = coming.popleft()
                delivery = source.take(wanted, taken)
                taken += 1
                settle(source)
                assert delivery.images[:, 0, 0, 0].tolist() == delivery.indices
                origins += delivery.origins
        assert set(origins) <= {"generated", "store"}
        assert len(source._lateness._relied) <= AHEAD * BATCH
        assert source._servers.fetched <= len(origins) + AHEAD * BATCH, (
            "nothing is fetched more often than it is wanted"
        )
        if slots > 25:
            assert "store" in origins, "the pool spares the server work"
    finally:
        source.close()


def test_what_the_pool_drops_all_the_same_is_asked_for_again(open_source):
    source = open_source(4 * SLOT)
    try:
        source.announce(requests([1, 2]), 0)
        settle(source)
        source.take(requests([1, 2]), 0)
        source.announce(requests([1, 2]), 5)
        assert source._servers.fetched == 2
        source.announce(requests([3, 4, 5, 6]), 1)
        settle(source)
        source.take(requests([3, 4, 5, 6]), 1)
        settle(source)
        assert source._servers.fetched == 8
        assert source.take(requests([1, 2]), 5).origins == ["generated"] * 2
        assert source._lateness._relied == {}
    finally:
        source.close()


def test_a_pool_too_small_for_one_variant_is_refused_before_the_first_step(open_source):
    with pytest.raises(PoolError, match=f"pool_bytes is {SLOT // 2} but one variant has {SLOT} bytes"):
        open_source(SLOT // 2)


def test_what_a_store_has_is_at_hand_however_late_the_server_is(open_source, monkeypatch, tmp_path):
    async def never(self, requests, *, ahead=False):
        await asyncio.sleep(60)

    monkeypatch.setattr(WiredFetcher, "fetch", never)
    facts = GeneratorFacts("any", "any", "none", bytes(16), {})
    stored = StoredVariants(VariantStore(tmp_path / "store"), facts)
    known, unknown = requests([1, 2]), requests([3])
    stored.keep(known, [np.full((3, SIDE, SIDE), row, np.uint8) for row in (1, 2)])
    source = open_source(300 * SLOT)
    source.with_store(stored)
    try:
        source.announce([known[0], *unknown, known[1]], 0)
        delivery = source.take([known[0], *unknown, known[1]], 0)
        assert delivery.origins == ["store", "real", "store"]
        assert delivery.images[:, 0, 0, 0].tolist() == [1, 2]
        assert source.refresh([*known, *requests([4])]) == requests([4])
        assert source.take(known, 1).origins == ["store"] * 2, "a step that nobody announced"
    finally:
        source.close()
