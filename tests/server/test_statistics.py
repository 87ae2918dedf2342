"""The counters of a server, without one."""

from __future__ import annotations

import asyncio

import pytest
from painter_server import Clock

from genssl import __version__
from genssl.generation.v1 import generation_pb2 as pb
from genssl.server.batching.jobs import BatchReport
from genssl.server.statistics import LAG_PERIOD, REASONS, Statistics


class Queue:
    """What waits and runs."""

    running, largest_bucket = 4, 16

    def queued_by_priority(self) -> dict[str, int]:
        return {"interactive": 1, "training": 20}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def statistics(clock) -> Statistics:
    return Statistics("cpu", [1, 4, 16], queued_bytes=lambda: 12345, clock=clock)


def test_a_histograms_bounds_are_inclusive(statistics):
    counters = statistics.register("digits")
    for rows in (0, 1, 2, 4, 5, 100, 100, 100):
        counters.batch_done(BatchReport(16, rows, 0.1, [], False))

    def value(name: str, **labels: str) -> float | None:
        return statistics.registry.get_sample_value(f"genssl_batch_size_{name}", {"generator": "digits", **labels})

    assert [value("bucket", le=bound) for bound in ("1.0", "4.0", "16.0", "+Inf")] == [2, 4, 5, 8]
    assert (value("sum"), value("count")) == (312, 8)


def test_the_proto_says_what_was_counted(statistics, clock):
    counters = statistics.register("digits")
    counters.watch(Queue())
    counters.delivered("generated", 3)
    counters.delivered("store", 5)
    counters.delivered("memory", 7)
    counters.delivered("shared", 11)
    counters.failed.inc(2)
    counters.dropped.inc()
    counters.sources_embedded(6, 0.25)
    counters.encode.observe(0.125)
    counters.batch_done(BatchReport(4, 3, 0.5, [0.1, 0.2, 0.3], False))
    counters.batch_done(BatchReport(4, 4, 0.5, [0.0] * 4, False))
    counters.batch_done(BatchReport(1, 1, 0.25, [1.0], False))
    statistics.rejected("queue_full")
    statistics.rejected("bad_image", 3)
    statistics.request("GenerateVariants", "OK", 0.7)
    statistics.request("GenerateVariants", "CANCELLED", 0.7)
    statistics.request("grpc.health.v1.Health/Check", "OK", 0.001)
    statistics.state = "draining"
    statistics.client("alice").variants += 26
    statistics.waiting["alice"] = 21
    clock.advance(60)
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


def test_clients_are_forgotten_after_ten_minutes_unless_they_wait(statistics, clock):
    for name in ("gone", "waiting", "here"):
        statistics.client(name)
    statistics.waiting["waiting"] = 1
    clock.advance(599)
    statistics.client("here")
    assert set(statistics.clients()) == {"gone", "waiting", "here"}
    clock.advance(2)
    assert set(statistics.clients()) == {"waiting", "here"}


def test_clients_with_made_up_names_take_bounded_memory(statistics):
    statistics.waiting["first"] = 1
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
        clock.advance(1.9)
        statistics.loop_was_late(0.001)
    assert statistics.recent_loop_lag == 2.0
    clock.advance(1)
    assert statistics.recent_loop_lag == 0.001
    assert statistics.registry.get_sample_value("genssl_event_loop_lag_seconds_count") == 6


def test_a_blocked_loop_is_noticed(statistics, clock):
    async def block() -> None:
        watching = asyncio.create_task(statistics.watch_loop())
        await asyncio.sleep(0)
        clock.advance(LAG_PERIOD + 0.4)  # in which nothing of the loop ran
        while not statistics.recent_loop_lag:
            await asyncio.sleep(0)
        watching.cancel()

    asyncio.run(asyncio.wait_for(block(), 20))
    assert statistics.recent_loop_lag == pytest.approx(0.4)
