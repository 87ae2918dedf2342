"""What a client reads of a refusal, and what it does not see of a bug; against a real server process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request

import grpc
import pytest
from server_without_generator import SECRET, server_without_generator

from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.wire.refusals import Refusal, read_refusal


@pytest.fixture(scope="module")
def server():
    with server_without_generator() as running:
        yield running


def refusal(server, **fields) -> Refusal:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.GenerationServiceStub(channel).GenerateVariants(pb.GenerateVariantsRequest(**fields), timeout=5)
    return read_refusal(caught.value)


FULL = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full; come back later", 2.5)


def test_a_refusal_is_read_back(server):
    assert refusal(server, generator_id="full") == FULL


def test_a_refusal_is_read_back_by_the_asyncio_client(server):
    code = (
        "import asyncio, sys, grpc\n"
        "from genssl.wire.refusals import read_refusal\n"
        "from genssl.generation.v1 import generation_pb2 as pb, generation_pb2_grpc as pb_grpc\n"
        "assert 'torch' not in sys.modules\n"
        "async def main():\n"
        "    async with grpc.aio.insecure_channel(sys.argv[1]) as channel:\n"
        "        try:\n"
        "            request = pb.GenerateVariantsRequest(generator_id='full')\n"
        "            await pb_grpc.GenerationServiceStub(channel).GenerateVariants(request)\n"
        "        except grpc.RpcError as error:\n"
        "            print(read_refusal(error))\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, server.address], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(FULL)


def test_long_texts_are_cut_to_what_trailers_carry(server):
    told = refusal(server, generator_id="bad")
    assert (told.code, told.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INVALID")
    assert told.message == "ä" * 510 + "…"
    assert told.retry_after is None


def test_statuses_of_others_have_no_reason(server):
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/made.up/Method")(b"", timeout=5)
    told = read_refusal(caught.value)
    assert (told.code, told.reason, told.retry_after) == (grpc.StatusCode.UNIMPLEMENTED, "", None)


@pytest.mark.parametrize("trailers", [None, (), (("grpc-status-details-bin", b"\xff\xff\xff"),)])
def test_absent_or_damaged_details_do_no_harm(trailers):
    metadata = None if trailers is None else grpc.aio.Metadata(*trailers)
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, "gone")
    assert read_refusal(error) == Refusal(grpc.StatusCode.UNAVAILABLE, "", "gone")


def test_a_bug_is_an_id_for_the_client_and_a_traceback_for_the_log():
    given = ["run-7:step.3", "", "two\nlines", "x" * 65]
    with server_without_generator(log="json") as server:
        refusals = [refusal(server, generator_id="bug", request_id=request_id) for request_id in given]
        again = refusal(server, generator_id="full")
        with grpc.insecure_channel(server.address) as channel:
            counted = pb_grpc.GenerationServiceStub(channel).GetStatistics(pb.GetStatisticsRequest(), timeout=5)
        log = [json.loads(line) for line in server.stop().splitlines()]
    assert again.reason == "QUEUE_FULL", "the server lives on"
    assert counted.requests == 5
    ids = [told.metadata["request_id"] for told in refusals]
    assert ids[0] == given[0]
    assert all(re.fullmatch("[0-9a-f]{12}", request_id) for request_id in ids[1:])
    assert [line["request_id"] for line in log] == ids
    for told, line in zip(refusals, log, strict=True):
        assert (told.code, told.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        expected = f"the server failed on this request; its log says more under the request id {line['request_id']}"
        assert told.message == expected
        assert line["exception"].startswith("Traceback")
        assert SECRET in line["exception"]


def test_a_client_that_leaves_during_its_refusal_is_no_fault_of_the_server():
    with server_without_generator() as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            # The server cannot tell a unary call from one that would take a stream, which learns that it has begun.
            start = channel.unary_stream("/genssl.generation.v1.GenerationService/GenerateVariants")
            for _ in range(5):
                call = start(pb.GenerateVariantsRequest(generator_id="left").SerializeToString())
                call.initial_metadata()
                call.cancel()
            ends = time.monotonic() + 60
            while (counted := stub.GetStatistics(pb.GetStatisticsRequest(), timeout=10)).requests < 5:
                assert time.monotonic() < ends
                time.sleep(0.02)
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        log = server.stop()
    assert counted.rejections["queue_full"] == 5
    assert 'genssl_requests_total{code="CANCELLED",method="GenerateVariants"} 5.0' in metrics
    assert "INTERNAL" not in metrics
    assert "Traceback" not in log
