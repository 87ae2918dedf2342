"""A real server with everything switched on: store, cache, limits, security, metrics, several generators."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from genssl.client.blocking import VariantClient
from genssl.data.base import StoredImage
from genssl.errors import RequestRefusedError, ServerUnavailableError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.variants.store.store import VariantStore
from genssl.wire.refusals import read_refusal

TOKEN = "a-token-of-more-than-sixteen-characters"


def source_of(stored: StoredImage, *, with_data: bool = True) -> pb.SourceImage:
    return pb.SourceImage(
        digest=stored.source_id,
        data=stored.data if with_data else b"",
        encoding=pb.IMAGE_ENCODING_RAW,
        channels=stored.channels,
        height=stored.height,
        width=stored.width,
    )


def ask(stub, stored, indices, *, timeout: float = 30, with_data: bool = True, **fields) -> pb.GenerateVariantsResponse:
    request = pb.GenerateVariantsRequest(
        **{
            "generator_id": "stable_unclip",
            "sources": [source_of(stored, with_data=with_data)],
            "variants": [pb.VariantSpec(variant_index=index) for index in indices],
        }
        | fields
    )
    return stub.GenerateVariants(request, timeout=timeout)


def origins(response: pb.GenerateVariantsResponse) -> list[int]:
    assert all(variant.status.code == pb.ITEM_CODE_OK for variant in response.variants), response.variants[0].status
    return [variant.origin for variant in response.variants]


def test_a_variant_is_made_once_and_survives_kill_9_in_the_store(start_server, tmp_path, digits_test):
    stored, other = digits_test.stored(0), digits_test.stored(1)
    settings = [f"store={{path: {tmp_path / 'variants'}}}"]
    with start_server(tmp_path, *settings) as server, grpc.insecure_channel(server.address) as channel:
        server.wait_until_serving()
        stub = pb_grpc.GenerationServiceStub(channel)
        first = ask(stub, stored, [0, 1, 2])
        assert origins(first) == [pb.ORIGIN_GENERATED] * 3
        again = ask(stub, stored, [1, 2, 3])
        assert origins(again) == [pb.ORIGIN_MEMORY] * 2 + [pb.ORIGIN_GENERATED]
        own_seed = ask(stub, stored, [], variants=[pb.VariantSpec(variant_index=0, seed=7)])
        assert origins(own_seed) == [pb.ORIGIN_GENERATED]
        assert origins(ask(stub, other, [0])) == [pb.ORIGIN_GENERATED]
        ends = time.monotonic() + 20
        with VariantStore(tmp_path / "variants", readonly=True) as written:
            while len(written) < 5:  # what was answered is written behind the answer
                assert time.monotonic() < ends
                time.sleep(0.01)
                written.refresh()
        server.stop(signal.SIGKILL)
    with start_server(tmp_path, *settings) as server, grpc.insecure_channel(server.address) as channel:
        server.wait_until_serving()
        stub = pb_grpc.GenerationServiceStub(channel)
        # The new server has not seen the source, and needs not: the name is enough for what was made before.
        after = ask(stub, stored, [0, 1, 2], with_data=False)
        assert origins(after) == [pb.ORIGIN_STORE] * 3
        assert [variant.data for variant in after.variants] == [variant.data for variant in first.variants]
        statistics = stub.GetStatistics(pb.GetStatisticsRequest()).generators[0]
        assert (statistics.variants_from_store, statistics.variants_generated) == (3, 0)
        # A seed of the client's own makes an image that no key names.
        missing = ask(stub, stored, [], with_data=False, variants=[pb.VariantSpec(variant_index=0, seed=7)])
        assert missing.variants[0].status.code == pb.ITEM_CODE_SOURCE_MISSING


def test_refusals_say_when_to_come_back(start_server, tmp_path, digits_test):
    limits = ["limits.max_queued_variants_per_client=8", "limits.max_queued_variants=12", "memory_cache_bytes=0"]
    with start_server(tmp_path, *limits) as server, grpc.insecure_channel(server.address) as channel:
        server.wait_until_serving()
        stub = pb_grpc.GenerationServiceStub(channel)
        stored = digits_test.stored(0)
        ask(stub, stored, [0])
        slow = {"parameters": {"num_inference_steps": 400.0}}
        waiting = stub.GenerateVariants.future(
            pb.GenerateVariantsRequest(
                generator_id="stable_unclip",
                sources=[source_of(stored)],
                variants=[pb.VariantSpec(variant_index=index) for index in range(8)],
                client_id="a",
                **slow,
            ),
            timeout=60,
        )
        while stub.GetStatistics(pb.GetStatisticsRequest()).generators[0].running == 0:
            time.sleep(0.01)
        with pytest.raises(grpc.RpcError) as own:
            ask(stub, stored, [9], client_id="a")
        with pytest.raises(grpc.RpcError) as everyone:
            ask(stub, stored, range(20, 26), client_id="b")
        assert origins(ask(stub, stored, [0], client_id="b")) == [pb.ORIGIN_GENERATED]
        with pytest.raises(grpc.RpcError) as never:
            ask(stub, stored, range(9), client_id="b")
        waiting.result()
        for caught, reason in ((own, "CLIENT_QUEUE_FULL"), (everyone, "QUEUE_FULL")):
            refusal = read_refusal(caught.value)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            assert refusal.retry_after is not None
            assert 0 < refusal.retry_after < 60
        assert never.value.code() == grpc.StatusCode.INVALID_ARGUMENT, "it would never fit"
        assert "1 to 8 are allowed" in never.value.details()


@pytest.fixture(scope="module")
def shared(start_server, tmp_path_factory):
    """A server with two generators and short messages."""
    block = "{name: stable_unclip, model: 'builtin:digits-unclip', guidance_scale: 1.0, num_inference_steps: 2"
    generators = f"generators=[{block}, noise_level: 0}}, {block}, id: wild, noise_level: 600}}]"
    folder = tmp_path_factory.mktemp("server")
    with start_server(folder, generators, "limits.max_message_bytes=400000") as server:
        server.wait_until_serving()
        yield server


@pytest.fixture
def stub(shared):
    with grpc.insecure_channel(shared.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def counters_of(stub) -> pb.GeneratorStatistics:
    return stub.GetStatistics(pb.GetStatisticsRequest()).generators[0]


def test_two_generators_share_a_server_and_have_queues_of_their_own(shared, digits_test):
    with VariantClient(shared.address) as client:
        assert sorted(info.generator_id for info in client.generators()) == ["stable_unclip", "wild"]
        images = [digits_test.image(row) for row in range(8)]
        calm = client.variants(images, 0, generator="stable_unclip")
        wild = client.variants(images, 0, generator="wild")
        assert not np.array_equal(calm.images, wild.images)
        with pytest.raises(RequestRefusedError, match=r"several generators; name one of them: stable_unclip, wild"):
            client.variants(images, 0)


def test_an_answer_that_exceeds_a_message_is_refused_before_it_is_made(stub, digits_test):
    large = {"output_size": 32.0}
    specs = [pb.VariantSpec(variant_index=index, parameters=large) for index in range(140)]
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, digits_test.stored(0), [], variants=specs)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    most = int(re.search(r"ask for at most (\d+) at once", caught.value.details())[1])
    assert 0 < most < 140
    assert origins(ask(stub, digits_test.stored(0), [], variants=specs[:most])) == [pb.ORIGIN_GENERATED] * most


def test_equal_parameters_have_equal_names_however_their_zeros_are_signed(stub, digits_test):
    first = ask(stub, digits_test.stored(0), [50], parameters={"guidance_scale": -0.0})
    again = ask(stub, digits_test.stored(0), [50], parameters={"guidance_scale": 0.0})
    assert origins(again) == [pb.ORIGIN_MEMORY]
    assert again.variants[0].data == first.variants[0].data


def test_what_would_be_late_is_refused_at_once(stub, digits_test):
    stored = digits_test.stored(1)
    slow = {"parameters": {"num_inference_steps": 100.0}}
    ask(stub, stored, range(16), **slow)  # now it knows what such batches cost
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, stored, range(100, 1000), timeout=0.5, **slow)
    refusal = read_refusal(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE")
    assert re.search(r"ready in \d+\.\d+ s, after the deadline", refusal.message)
    assert time.monotonic() - started < 0.5, "refused ahead of the deadline, not at it"
    assert stub.GetStatistics(pb.GetStatisticsRequest()).rejections["deadline"] == 1
    assert sum(counters_of(stub).queued.values()) == 0


def test_the_variants_of_a_client_that_hung_up_are_not_made_but_those_begun_are_kept(stub, digits_test):
    before = counters_of(stub)
    request = pb.GenerateVariantsRequest(
        generator_id="stable_unclip",
        sources=[source_of(digits_test.stored(2))],
        variants=[pb.VariantSpec(variant_index=index) for index in range(600)],
        parameters={"num_inference_steps": 40.0},
    )
    call = stub.GenerateVariants.future(request, timeout=60)
    while sum(batch.rows for batch in counters_of(stub).batches) == sum(batch.rows for batch in before.batches):
        time.sleep(0.01)
    call.cancel()
    deadline = time.monotonic() + 20
    while True:
        after = counters_of(stub)
        if after.running == 0 and sum(after.queued.values()) == 0:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    computed = sum(batch.rows for batch in after.batches) - sum(batch.rows for batch in before.batches)
    assert computed < 400
    assert after.variants_dropped - before.variants_dropped >= 200
    again = ask(stub, digits_test.stored(2), range(8), parameters={"num_inference_steps": 40.0})
    assert origins(again) == [pb.ORIGIN_MEMORY] * 8, "what was computed for nobody is not computed again"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    server.private_key_pem.write_to_path(folder / "key.pem")
    for number, part in enumerate(server.cert_chain_pems):
        part.write_to_path(folder / "certificate.pem", append=number > 0)
    (folder / "token").write_text(TOKEN + "\n")
    return folder


def test_tls_tokens_metrics_and_json_logs_together(start_server, tmp_path, digits_test, certificates):
    settings = [
        f"tls={{certificate: {certificates / 'certificate.pem'}, key: {certificates / 'key.pem'}}}",
        f"tokens=[{{name: lab, file: {certificates / 'token'}, "
        "max_variants_per_second: 50, max_queued_variants: 4000}]",
        "limits.max_variants_per_request=16",
        "metrics={address: '127.0.0.1:0'}",
        "log=json",
    ]

    class Files:
        ca, certificate, key = certificates / "ca.pem", None, None

    with start_server(tmp_path, *settings) as server:
        images = [digits_test.image(row) for row in range(4)]
        with VariantClient(server.address, tls=Files, token=TOKEN, client_id="me") as client:
            batch = client.variants(images, 5)  # waits until the server has loaded
            assert batch.images.shape == (4, 3, 8, 8)
        with (
            VariantClient(server.address, tls=Files, token=TOKEN, deadline_seconds=3) as greedy,
            # 100 are a burst; the others must wait for seconds. The queue has room for all: only the rate refuses.
            pytest.raises(ServerUnavailableError, match="50 variants a second"),
        ):
            greedy.variants(images[:1] * 600, range(600))
        with (
            VariantClient(server.address, tls=Files, token="x" * 32) as stranger,
            pytest.raises(RequestRefusedError, match="UNAUTHENTICATED"),
        ):
            stranger.variants(images, 0)
        lines = [json.loads(line) for line in server.log_path.read_text().splitlines() if line.startswith("{")]
        (page,) = [line["message"].split()[-1] for line in lines if line["message"].startswith("metrics at")]
        with urllib.request.urlopen(page, timeout=10) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
        made = {
            sample.labels["origin"]: sample.value
            for sample in families["genssl_variants"].samples
            if sample.name == "genssl_variants_total"
        }
        assert made["generated"] >= 4
        rejected = {sample.labels["reason"]: sample.value for sample in families["genssl_rejected"].samples}
        assert rejected["auth"] >= 1
        assert rejected["rate"] >= 1
        assert TOKEN not in server.log_path.read_text()


def test_a_second_sigterm_stops_a_draining_server_at_once(start_server, tmp_path, digits_test):
    with start_server(tmp_path, "drain_seconds=60") as server, grpc.insecure_channel(server.address) as channel:
        server.wait_until_serving()
        stub = pb_grpc.GenerationServiceStub(channel)
        call = stub.GenerateVariants.future(
            pb.GenerateVariantsRequest(
                generator_id="stable_unclip",
                sources=[source_of(digits_test.stored(0))],
                variants=[pb.VariantSpec(variant_index=index) for index in range(64)],
                parameters={"num_inference_steps": 1000.0},
            ),
            timeout=60,
        )
        while stub.GetStatistics(pb.GetStatisticsRequest()).generators[0].running == 0:
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGTERM)
        ends = time.monotonic() + 20
        while "draining" not in server.log_path.read_text():  # of two signals at once the process would see one
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert server.process.poll() is None, "it finishes the request under way"
        started = time.monotonic()
        assert server.stop(signal.SIGTERM) == 1
        assert time.monotonic() - started < 5
        call.cancel()
