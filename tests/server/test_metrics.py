"""/metrics, scraped over HTTP from a real server process."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_without_generator import server_without_generator

from genssl import __version__
from genssl.config.server import MetricsConfig
from genssl.errors import UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.server.cache import WriteThrough
from genssl.server.certificates import keep_rereading
from genssl.server.metrics import MetricsServer
from genssl.server.statistics import Statistics
from genssl.variants.store.store import VariantStore


@pytest.fixture(scope="module")
def server():
    with server_without_generator() as running:
        yield running


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def fetch(server, path: str = "/metrics", **headers: str):
    request = urllib.request.Request(f"http://{server.metrics}{path}", headers=headers)
    return urllib.request.urlopen(request, timeout=10)


def fetch_until(server, done: Callable[[], bool]) -> None:
    while not done():
        fetch(server)


def scrape(server) -> dict[tuple[str, frozenset], float]:
    text = fetch(server).read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def increase(after, before, name: str, **labels: str) -> float:
    key = name, frozenset(labels.items())
    return after.get(key, 0) - before.get(key, 0)


def value(samples: dict[tuple[str, frozenset], float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_what_happens_is_counted(server, stub):
    before = scrape(server)
    for _ in range(2):
        stub.GenerateVariants(pb.GenerateVariantsRequest(generator_id="digits", client_id="me"), timeout=10)
    with pytest.raises(grpc.RpcError):
        stub.GenerateVariants(pb.GenerateVariantsRequest(generator_id="full"), timeout=10)
    with pytest.raises(grpc.RpcError):
        stub.GenerateVariants(pb.GenerateVariantsRequest(generator_id="slow"), timeout=0.5)
    ends = time.monotonic() + 10
    while True:  # the server sees on its own that the deadline has passed, and looks at its loop now and then
        after = scrape(server)
        more = partial(increase, after, before)
        requests = more("genssl_request_seconds_count", method="GenerateVariants")
        if requests >= 4 and more("genssl_event_loop_lag_seconds_count") > 0:
            break
        assert time.monotonic() < ends, f"{requests} of 4 requests were counted"
        time.sleep(0.02)

    assert more("genssl_variants_total", generator="digits", origin="generated") == 6
    assert more("genssl_cache_hits_total", generator="digits", cache="memory") == 2
    assert more("genssl_rejected_total", reason="queue_full") == 1
    assert more("genssl_requests_total", method="GenerateVariants", code="OK") == 2
    assert more("genssl_requests_total", method="GenerateVariants", code="RESOURCE_EXHAUSTED") == 1
    assert more("genssl_requests_total", method="GenerateVariants", code="DEADLINE_EXCEEDED") == 1
    assert more("genssl_request_seconds_count", method="GenerateVariants") == 4
    assert more("genssl_batch_size_bucket", generator="digits", le="1.0") == 0
    assert more("genssl_batch_size_bucket", generator="digits", le="4.0") == 2
    assert more("genssl_batch_size_bucket", generator="digits", le="+Inf") == 2
    assert more("genssl_queue_wait_seconds_bucket", generator="digits", le="0.1") == 4
    assert more("genssl_queue_wait_seconds_count", generator="digits") == 6
    assert more("genssl_queue_wait_seconds_sum", generator="digits") == pytest.approx(1.2)
    assert more("genssl_generate_seconds_sum", generator="digits") == pytest.approx(1.0)
    assert more("genssl_event_loop_lag_seconds_count") > 0


def test_what_is_so_now(server):
    samples = scrape(server)
    assert value(samples, "genssl_build_info", version=__version__, device="cpu") == 1
    assert value(samples, "genssl_state", state="serving") == 1
    assert value(samples, "genssl_state", state="loading") == value(samples, "genssl_draining") == 0
    assert value(samples, "genssl_queue_depth", generator="digits", priority="training") == 7
    assert value(samples, "genssl_queue_depth", generator="digits", priority="bulk") == 0
    assert value(samples, "genssl_running_variants", generator="digits") == 3
    assert value(samples, "genssl_batch_occupancy_ratio", generator="digits") in (0, 0.75)
    assert value(samples, "genssl_queued_bytes") == 2**20
    assert value(samples, "process_resident_memory_bytes") > 2**20


def test_labels_are_bounded(server, stub):
    allowed = {"generator", "priority", "origin", "reason", "method", "code", "cache", "bucket", "state", "le"}
    with grpc.insecure_channel(server.address) as channel:
        for number in range(3):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/made.up.Service/Method{number}")(b"", timeout=10)
    stub.GenerateVariants(pb.GenerateVariantsRequest(client_id="a-client-name"), timeout=10)
    samples = scrape(server)
    assert {label for _, labels in samples for label, _ in labels} <= allowed | {"version", "device"}
    assert value(samples, "genssl_requests_total", method="unknown", code="UNIMPLEMENTED") == 3
    text = fetch(server).read().decode()
    assert "made.up" not in text
    assert "a-client-name" not in text


def test_nothing_else_is_served(server):
    for path in ("/", "/metrics/", "/favicon.ico", "/../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(server, path)
        assert caught.value.code == 404
    assert fetch(server, "/metrics?name[]=x").headers["Server"] == "genssl"


def test_openmetrics_is_spoken_to_those_who_ask(server):
    answer = fetch(server, Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.read().endswith(b"# EOF\n")


def test_a_blocked_event_loop_fails_the_scrape_instead_of_hanging_it(server, stub):
    with grpc.insecure_channel(server.address) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GenerateVariants.future(
            pb.GenerateVariantsRequest(generator_id="block"), timeout=10
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch_until(server, call.done)
        assert caught.value.code == 503
        call.result()
    ends = time.monotonic() + 10  # the loop measures its lag soon after it goes on, and a scrape may come before
    while value(scrape(server), "genssl_event_loop_lag_recent_max_seconds") <= 1:
        assert time.monotonic() < ends


def test_a_taken_port_is_a_users_error_and_a_closed_server_frees_its_own():
    async def start(address: str) -> MetricsServer:
        return MetricsServer(MetricsConfig(address=address), Statistics("cpu", [1], queued_bytes=int).registry)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"metrics\.address: {address}: cannot be bound .*port 0"):
            asyncio.run(start(address))
    threads = threading.active_count()
    server = asyncio.run(start(address))
    assert server.address == address
    server.close()
    assert threading.active_count() == threads
    asyncio.run(start(address)).close()


def test_the_loss_of_the_store_is_a_metric(tmp_path):
    async def states() -> dict[str, float]:
        store = WriteThrough(VariantStore(tmp_path / "store"))
        statistics = Statistics("cpu", [1], queued_bytes=int)
        statistics.watch_store(lambda: store.state)
        server = MetricsServer(MetricsConfig(address="127.0.0.1:0"), statistics.registry)

        async def scraped() -> dict[str, float]:
            text = await asyncio.to_thread(
                lambda: urllib.request.urlopen(f"http://{server.address}/metrics", timeout=20).read().decode()
            )
            (family,) = [one for one in text_string_to_metric_families(text) if one.name == "genssl_store_state"]
            return {sample.labels["state"]: sample.value for sample in family.samples}

        before = await scraped()
        shutil.rmtree(tmp_path / "store")
        rereading = asyncio.create_task(keep_rereading([store], 0.01))
        while (after := await scraped()) == before:
            pass
        rereading.cancel()
        await asyncio.to_thread(server.close)
        await store.close()
        assert before == {"writing": 1, "full": 0, "failing": 0, "gone": 0}
        return after

    assert asyncio.run(asyncio.wait_for(states(), 60)) == {"writing": 0, "full": 0, "failing": 0, "gone": 1}
