"""The counters of a server, without one."""

from __future__ import annotations

import asyncio
import time

import pytest

from genssl import __version__
from genssl.generation.v1 import generation_pb2 as pb
from genssl.server.statistics import REASONS, Histogram, Statistics


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queued_of() -> dict[str, int]:
    return {}


@pytest.fixture
def statistics(clock, queued_of) -> Statistics:
    return Statistics("cpu", queued_bytes=lambda: 12345, queued_of=lambda name: queued_of.get(name, 0), clock=clock)


def register(statistics: Statistics):
    return statistics.register(
        "digits",
        buckets=[1, 4, 16],
        queued=lambda: {"interactive": 1, "training": 20},
        running=lambda: 4,
        largest_bucket=lambda: 16,
    )


def test_a_histograms_bounds_are_inclusive():
    histogram = Histogram([1, 4])
    for value in (0.5, 1, 1.001, 4, 5):
        histogram.observe(value)
    histogram.observe(100, times=3)
    assert histogram.counts == [2, 2, 4]
    assert histogram.sum == pytest.approx(311.501)
    assert histogram.count == 8


def test_the_proto_says_what_was_counted(statistics, clock, queued_of):
    counters = register(statistics)
    counters.variants["generated"] += 3
    counters.variants["store"] += 5
    counters.variants["memory"] += 7
    counters.variants["shared"] += 11
    counters.failed += 2
    counters.dropped += 1
    counters.embedded(6, 0.25)
    counters.encode.observe(0.125)
    counters.batch_computed(bucket=4, rows=3, seconds=0.5, waits=[0.1, 0.2, 0.3])
    counters.batch_computed(bucket=4, rows=4, seconds=0.5, waits=[0.0] * 4)
    counters.batch_computed(bucket=1, rows=1, seconds=0.25, waits=[1.0])
    statistics.rejected("queue_full")
    statistics.rejected("bad_image", 3)
    statistics.request("GenerateVariants", "OK", 0.7)
    statistics.request("GenerateVariants", "CANCELLED", 0.7)
    statistics.request("grpc.health.v1.Health/Check", "OK", 0.001)
    statistics.state = "draining"
    statistics.client("alice").variants += 26
    queued_of["alice"] = 21
    clock.now += 60
    statistics.loop_was_late(0.5)
    assert statistics.to_proto() == pb.GetStatisticsResponse(
        version=__version__,
        device="cpu",
        state="draining",
        uptime_seconds=60,
        generators=[
            pb.GeneratorStatistics(
                generator_id="digits",
                queued={"interactive": 1, "training": 20},
                running=4,
                variants_generated=3,
                variants_from_store=5,
                variants_from_memory=7,
                variants_shared=11,
                variants_failed=2,
                variants_dropped=1,
                sources_embedded=6,
                embed_seconds=0.25,
                encode_seconds=0.125,
                queue_wait_seconds=0.1 + 0.2 + 0.3 + 1.0,
                batches=[
                    pb.BatchStatistics(bucket=1, batches=1, rows=1, generate_seconds=0.25),
                    pb.BatchStatistics(bucket=4, batches=2, rows=7, generate_seconds=1.0),
                ],
                largest_bucket=16,
            )
        ],
        clients=[
            pb.ClientStatistics(client_id="alice", queued_variants=21, variants=26, seconds_since_last_request=60)
        ],
        rejections={**dict.fromkeys(REASONS, 0), "queue_full": 1, "bad_image": 3},
        requests=2,
        queued_bytes=12345,
        event_loop_lag_seconds=0.5,
    )
    assert counters.occupancy == 8 / 9


def test_clients_are_forgotten_after_ten_minutes_unless_they_wait(statistics, clock, queued_of):
    for name in ("gone", "waiting", "here"):
        statistics.client(name)
    queued_of["waiting"] = 1
    clock.now += 599
    statistics.client("here")
    assert set(statistics.clients()) == {"gone", "waiting", "here"}
    clock.now += 2
    assert set(statistics.clients()) == {"waiting", "here"}


def test_clients_with_made_up_names_take_bounded_memory(statistics, queued_of):
    queued_of["first"] = 1
    statistics.client("first").variants += 9
    for number in range(1000):
        statistics.client(f"{number:04}" * 1000)
    clients = statistics.clients()
    assert len(clients) == 256
    assert clients["first"].variants == 9, "who has variants waiting is kept"
    assert max(map(len, clients)) == 128
    assert next(reversed(clients)).startswith("0999")


def test_lag_is_the_greatest_of_the_last_ten_seconds(statistics, clock):
    statistics.loop_was_late(2.0)
    for _ in range(5):
        clock.now += 1.9
        statistics.loop_was_late(0.001)
    assert statistics.recent_loop_lag == 2.0
    clock.now += 1
    assert statistics.recent_loop_lag == 0.001
    assert statistics.loop_lag.count == 6


def test_a_blocked_loop_is_noticed():
    async def block() -> Statistics:
        statistics = Statistics("cpu", queued_bytes=int, queued_of=len)
        watching = asyncio.create_task(statistics.watch_loop())
        await asyncio.sleep(0.01)
        time.sleep(0.4)
        await asyncio.sleep(0.01)
        watching.cancel()
        return statistics

    assert 0.25 < asyncio.run(block()).recent_loop_lag < 5
