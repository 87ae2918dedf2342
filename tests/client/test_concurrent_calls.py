"""More calls at once than a connection may have: they wait in the client, and no server counts as away for it."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from stub_server import GREY, stub_server

from genssl import AsyncVariantClient
from genssl.client.balancer import TargetPool
from genssl.client.messages import Answer
from genssl.client.server_state import Target
from genssl.config.limits import LimitsConfig
from genssl.generation.v1 import generation_pb2 as pb
from genssl.variants.prefetch import loop as background
from genssl.wire.channel import OTHER_CALLS

CALLS = 200


def outcome_of(address: str, clients: int, digits) -> tuple[list[int], list[str], int]:
    """Makes 200 calls at once; returns the retries of each, the clients' troubles, and the most calls of a client."""

    async def ask() -> tuple[list[int], list[str], int]:
        made = [AsyncVariantClient(address, client_id=f"c{n}", max_in_flight=CALLS) for n in range(clients)]
        targets = [client._pool.targets[0] for client in made]
        most = 0
        begin = Target.begin

        def counted(target: Target, rows: int) -> int:
            nonlocal most
            number = begin(target, rows)
            most = max(most, target.in_flight)
            return number

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Target, "begin", counted)
                await asyncio.gather(*(client.connect() for client in made))
                statistics = asyncio.gather(*(made[0].statistics() for _ in range(20)))
                batches = await asyncio.gather(
                    *(made[n % clients].variants([digits[n % len(digits)]], 5000 + n) for n in range(CALLS))
                )
                await statistics
            return [batch.retries for batch in batches], [target.trouble for target in targets], most
        finally:
            await asyncio.gather(*(client.close() for client in made))

    return background.run(ask(), 120)


@pytest.mark.parametrize("clients", [1, 4])
def test_calls_beyond_what_a_connection_may_have_wait_and_none_is_reset(server, digits_train, clients):
    digits = [digits_train.image(row) for row in range(40)]
    retries, troubles, most = outcome_of(server.address, clients, digits)
    assert sum(retries) == 0, "none was repeated"
    assert troubles == [""] * clients
    assert most <= LimitsConfig().max_calls_per_connection - OTHER_CALLS


def test_a_server_states_fewer_calls_than_it_has_streams(server):
    async def ask() -> int:
        client = AsyncVariantClient(server.address)
        try:
            await client.connect()
            return client.servers[server.address].max_concurrent_calls
        finally:
            await client.close()

    assert 2 <= background.run(ask(), 60) <= LimitsConfig().max_calls_per_connection


@pytest.mark.parametrize(("stated", "most"), [(0, 30), (8, 6), (2, 1), (10**6, 50)])
def test_a_window_keeps_within_what_the_server_states(stated, most):
    async def ask() -> int:
        target = Target("127.0.0.1:1", tls=None, token=None, max_in_flight=50)
        target.info = pb.GetServerInfoResponse(max_concurrent_calls=stated)
        while target.has_room:
            target.begin(1)
        await target.channel.close()
        return target.in_flight

    assert background.run(ask(), 60) == most


def test_who_waits_for_room_gets_it_in_the_order_of_coming(tmp_path):
    with stub_server(tmp_path) as (address, _):

        async def ask() -> list[int]:
            pool = TargetPool([address], tls=None, token=None, max_in_flight=1)
            order: list[int] = []

            async def one(number: int) -> None:
                target = await pool._acquire()
                call = target.begin(1)
                order.append(number)
                await asyncio.sleep(0)
                target.end(call, 1)
                pool._changed.set()

            try:
                await pool.connect()
                await pool.offered()
                await asyncio.gather(*(one(number) for number in range(50)))
            finally:
                await pool.close()
            return order

        assert background.run(ask(), 60) == list(range(50))


def test_a_stream_that_a_server_refuses_is_repeated_as_at_a_full_one():
    async def ask() -> tuple[Answer, Target]:
        pool = TargetPool(["127.0.0.1:1"], tls=None, token=None, max_in_flight=8)
        target, tally = pool.targets[0], Answer()
        target.ready = True
        details = "Stream removed (RST_STREAM (Received RST_STREAM with error code 7))"
        nothing = grpc.aio.Metadata()
        error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details=details)
        pool._failed(target, error, 1.0, tally)
        await pool.close()
        return tally, target

    tally, target = background.run(ask(), 60)
    assert (tally.retries, tally.refusals) == (1, 1)
    assert target.ready, "it is not away"
    assert target.window.size == 4


def test_several_clients_of_a_process_have_connections_of_their_own(tmp_path):
    with stub_server(tmp_path) as (address, calls):

        async def ask() -> None:
            clients = [AsyncVariantClient(address) for _ in range(3)]
            try:
                for client in clients:
                    await client.variants(GREY[:1], 0)
            finally:
                await asyncio.gather(*(client.close() for client in clients))

        background.run(ask(), 60)
        assert len({call["peer"] for call in calls()}) == 3
