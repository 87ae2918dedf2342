"""What hostile clients can make a server hold: no more than the number in its file, and nothing once they are gone."""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from raw_http2 import Connection, message

from genssl.data.base import StoredImage, raw_image
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.wire.refusals import read_refusal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

GENERATE = "/genssl.generation.v1.GenerationService/GenerateVariants"
CHECK = "/grpc.health.v1.Health/Check"
BOUND = 96 * 2**20
MESSAGE = 2 * 2**20
CALLS = 16
LIMITS = {
    "max_memory_bytes": BOUND,
    "max_message_bytes": MESSAGE,
    "max_image_bytes": 2**20,
    "max_image_pixels": 400_000,
    "max_request_pixels": 2_000_000,
    "max_queued_bytes_per_client": 16 * 2**20,
    "max_connections": 8,
    "max_calls_per_connection": CALLS // 2,  # the server has twice as many streams
    "receive_seconds": 3,
    "send_seconds": 4,
}
VARIANTS = 600  # of 3 KiB each: an answer of nearly the largest size


@pytest.fixture(scope="module")
def server(start_server, tmp_path_factory):
    settings = [f"limits.{name}={value}" for name, value in LIMITS.items()]
    with start_server(tmp_path_factory.mktemp("server"), *settings, "memory_cache_bytes=4194304") as running:
        running.wait_until_serving()
        yield running


@pytest.fixture
def stub(server) -> Iterator[pb_grpc.GenerationServiceStub]:
    with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def request(seed: int, variants: int = VARIANTS) -> pb.GenerateVariantsRequest:
    stored = raw_image(np.full((1, 8, 8), seed % 251, np.uint8))
    source = pb.SourceImage(
        digest=stored.source_id, data=stored.data, encoding=pb.IMAGE_ENCODING_RAW, channels=1, height=8, width=8
    )
    return pb.GenerateVariantsRequest(
        generator_id="stable_unclip",
        sources=[source],
        variants=[pb.VariantSpec(variant_index=index) for index in range(variants)],
        parameters={"output_size": 32},
    )


class Resident:
    """The resident memory of a process, watched: how far it rose above what it was at first."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/statm")
        self._first, self.rise = self._now(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _now(self) -> int:
        return int(self._path.read_text().split()[1]) * 4096

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.rise = max(self.rise, self._now() - self._first)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def connections(server, count: int, window: int = 65535) -> Iterator[list[Connection]]:
    made = [Connection(server.address, window) for _ in range(count)]
    try:
        for connection in made:
            connection.poll(0.5)  # the server's settings
        yield made
    finally:
        for connection in made:
            connection.close()


def until_ended(bad: list[Connection], stub, calls: int) -> int:
    """Lets bad clients go on until the server has ended all their calls; returns how often a good one was served."""
    served = 0
    ends, asked = time.monotonic() + 120, 0.0
    while any(len(connection.ended) < calls for connection in bad):
        assert time.monotonic() < ends, [len(connection.ended) for connection in bad]
        for connection in bad:
            connection.poll(0.005)
        if time.monotonic() > asked + 0.5:
            asked = time.monotonic()
            try:
                served += len(stub.GenerateVariants(request(served, 1), timeout=30).variants)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # which asks to come back
                    raise
    return served


def held(stub) -> int:
    return stub.GetStatistics(pb.GetStatisticsRequest(), timeout=30).queued_bytes


def warm_up(stub) -> None:
    for _ in range(3):
        stub.GenerateVariants(request(7), timeout=60)


@pytest.mark.slow
def test_clients_that_never_read_their_answers_hold_no_more_than_the_bound_and_are_dropped(server, stub):
    warm_up(stub)
    assert held(stub) == 0
    data = message(request(7).SerializeToString())
    with Resident(server.process.pid) as resident, connections(server, 6, window=0) as bad:
        for connection in bad:
            for _ in range(CALLS):
                connection.call(GENERATE, data)
        for connection in bad:
            connection.poll()
        assert any(held(stub) for _ in range(20)), "what is made and not sent counts"
        assert until_ended(bad, stub, CALLS) > 0
        assert held(stub) == 0
        assert not any(connection.received for connection in bad)
    assert resident.rise < 1.2 * BOUND


@pytest.mark.slow
def test_messages_that_are_never_finished_hold_no_more_than_the_bound_and_are_refused(server, stub):
    warm_up(stub)
    with Resident(server.process.pid) as resident, connections(server, 6) as bad:
        for connection in bad:
            for _ in range(CALLS):
                connection.call(GENERATE, message(bytes(MESSAGE - 100))[:-1])
        assert until_ended(bad, stub, CALLS) > 0
        assert held(stub) == 0
    assert resident.rise < 1.2 * BOUND


@pytest.mark.slow
def test_unfinished_messages_of_small_methods_hold_no_more_and_health_checks_are_answered(server, stub):
    warm_up(stub)
    with Resident(server.process.pid) as resident, connections(server, 3) as bad:
        for connection in bad:
            for _ in range(CALLS):
                connection.call(CHECK, message(bytes(MESSAGE - 100))[:-1])
        for _ in range(5):
            for connection in bad:
                connection.poll(0.05)
            assert server.health() == 1
    assert resident.rise < 1.2 * BOUND


def test_only_a_window_of_a_message_comes_in_before_its_turn(server, stub):
    with connections(server, 1) as (bad,):
        for _ in range(CALLS):
            bad.call(GENERATE, message(bytes(MESSAGE - 100))[:-1])
        for _ in range(40):
            bad.poll(0.01)
        waiting = [left for left in bad._unsent.values() if len(left)]
        assert len(waiting) + len(bad.ended) >= CALLS // 2, "some may have been refused by now"
        assert all(len(left) >= MESSAGE - 100 - 2**16 for left in waiting)
        assert held(stub) <= LIMITS["max_memory_bytes"] // 4


@pytest.mark.slow
def test_health_watches_that_are_never_read_do_not_keep_the_server_from_stopping(start_server, tmp_path):
    with start_server(tmp_path, "drain_seconds=0") as server:
        server.wait_until_serving()
        with connections(server, 1, window=0) as (bad,):
            for _ in range(CALLS):
                bad.call("/grpc.health.v1.Health/Watch", message(b""))
            bad.poll(0.5)
            assert server.stop() == 0


def picture_request(greys: range) -> pb.GenerateVariantsRequest:
    """A request with PNGs of 360,000 pixels, each of a grey of its own."""
    sources = []
    for grey in greys:
        buffer = io.BytesIO()
        Image.new("L", (600, 600), grey).save(buffer, "PNG")
        stored = StoredImage(buffer.getvalue(), "file")
        sources.append(pb.SourceImage(digest=stored.source_id, data=stored.data, encoding=pb.IMAGE_ENCODING_FILE))
    specs = [pb.VariantSpec(source_index=index) for index in range(len(greys))]
    return pb.GenerateVariantsRequest(generator_id="stable_unclip", sources=sources, variants=specs)


def test_a_request_has_a_budget_of_pixels(stub):
    answer = stub.GenerateVariants(picture_request(range(5)), timeout=60)
    assert {variant.status.code for variant in answer.variants} == {pb.ITEM_CODE_OK}
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateVariants(picture_request(range(10, 16)), timeout=60)
    refusal = read_refusal(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "TOO_LARGE")
    assert "6 images have 2,160,000 pixels in all; the limit is 2,000,000" in refusal.message
    assert held(stub) == 0


def test_connections_beyond_the_limit_are_closed(server):
    with connections(server, LIMITS["max_connections"] + 4) as opened:
        for connection in opened:
            connection.poll(0.2)
        assert sum(connection.closed for connection in opened) >= 4
        assert not all(connection.closed for connection in opened)
