"""Connections whose other end vanishes, never speaks or has nothing to ask, at a server with genssl's own options."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from genssl.config.limits import LimitsConfig
from genssl.wire.channel import CLIENT_OPTIONS, SERVER_KEEPALIVE, server_options

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]) + bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
PATIENCE = 30.0  # many times what the test sets, and half of what gRPC by itself gives a dead peer
READY, IDLE = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.IDLE


@asynccontextmanager
async def serving(**milliseconds: int) -> AsyncIterator[tuple[str, health.aio.HealthServicer]]:
    """Serves health with some of the times shortened."""
    times = {f"grpc.{name}_ms": value for name, value in milliseconds.items()}
    times = {name.replace("http2_", "http2."): value for name, value in times.items()}
    assert times.keys() <= SERVER_KEEPALIVE.keys(), "only what the server sets can be shortened"
    server = grpc.aio.server(options=server_options(LimitsConfig(), SERVER_KEEPALIVE | times))
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        await server.stop(None)


def heard_until_closed(address: str, said: bytes) -> bytes:
    """Says something to a server, then nothing more; returns all that comes until the server hangs up."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(said)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize(
    ("said", "times", "last"),
    [
        (PREFACE, {"keepalive_time": 300, "http2_ping_timeout": 300}, b"ping"),
        (b"", {"server_handshake_timeout": 300}, b""),
        (PREFACE, {"max_connection_idle": 300}, b"idle"),
    ],
    ids=["vanished", "silent from the start", "idle"],
)
def test_a_connection_that_nobody_uses_is_closed(said, times, last):
    async def run() -> bytes:
        async with serving(**times) as (address, _):
            return await asyncio.to_thread(heard_until_closed, address, said)

    assert last in asyncio.run(run())


def test_clients_outlive_the_end_of_their_idle_connections():
    request = health_pb2.HealthCheckRequest()

    async def run() -> None:
        async with (
            serving(max_connection_idle=300) as (address, servicer),
            grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS) as watching,
        ):
            watch = health_pb2_grpc.HealthStub(watching).Watch(request, timeout=PATIENCE)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            options = [*CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(address, options=options) as channel:
                for _ in range(2):
                    await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE)
                    while (state := channel.get_state()) != IDLE:
                        await asyncio.wait_for(channel.wait_for_state_change(state), PATIENCE)
                await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE)
            await servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING, "a watch is a call"
            watch.cancel()

    asyncio.run(run())


def test_a_client_ends_a_connection_that_does_not_answer_its_pings():
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(2 * PATIENCE)
            connection.sendall(PREFACE[24:])
            while connection.recv(65536):
                pass

    async def run(address: str) -> grpc.aio.AioRpcError:
        shorter = {"grpc.keepalive_time_ms": 300, "grpc.http2.ping_timeout_ms": 300}
        assert shorter.keys() <= dict(CLIENT_OPTIONS).keys()
        options = list((dict(CLIENT_OPTIONS) | shorter).items())
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        return caught.value

    async def both() -> grpc.aio.AioRpcError:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            answering = asyncio.create_task(asyncio.to_thread(answer, listener))
            error = await run(f"127.0.0.1:{listener.getsockname()[1]}")
            await answering
        return error

    error = asyncio.run(both())
    assert error.code() == grpc.StatusCode.UNAVAILABLE, "not its deadline"
    assert "ping timeout" in error.details()


def test_pings_come_in_time_and_offend_nobody():
    client, server = dict(CLIENT_OPTIONS), dict(server_options(LimitsConfig()))
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_time_ms"] + client["grpc.http2.ping_timeout_ms"] < 50_000, "within a call's deadline"
    assert server["grpc.keepalive_time_ms"] + server["grpc.http2.ping_timeout_ms"] <= 120_000
    assert server["grpc.keepalive_permit_without_calls"] == 1
