"""Several servers of one client, and what its errors say of them, against servers that can be stopped at will."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import contextmanager

import numpy as np
import pytest
from stub_server import GREY, stopped, stub_server

from genssl import AsyncVariantClient, VariantClient
from genssl.client import blocking as sync_client
from genssl.client.server_state import FIRST_AVOIDANCE, RECIPE_ADVICE, SILENT_SECONDS, Target, state_of
from genssl.data.base import raw_image
from genssl.errors import RequestRefusedError, ServerUnavailableError
from genssl.variants.prefetch import loop as background
from genssl.variants.source import VariantRequest


@contextmanager
def two_servers(folder):
    with stub_server(folder) as first, stub_server(folder) as second:
        yield dict([first, second])


def used_both(client: VariantClient, servers) -> None:
    """Two calls do, unless a server is slow to connect, as on busy cores."""
    ends = time.monotonic() + 20
    while not all(calls() for calls in servers.values()):
        assert time.monotonic() < ends, "one of the servers was never asked"
        client.variants(GREY[:3], 0)


def test_calls_one_by_one_are_shared_and_each_server_gets_a_source_once(tmp_path):
    with two_servers(tmp_path) as servers, VariantClient(list(servers)) as client:
        used_both(client, servers)
        before = [len(calls()) for calls in servers.values()]
        for index in range(10):
            assert client.variants(GREY[:3], index).images[:, 0, 0, 0].tolist() == [index, index + 1, index + 2]
        seen = [calls() for calls in servers.values()]
    assert [sum(call["uploads"] for call in calls) for calls in seen] == [3, 3]
    assert [len(calls) - earlier for calls, earlier in zip(seen, before, strict=True)] == [5, 5]


def test_a_stuck_server_fails_one_call_by_name_and_is_asked_again_when_it_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr("genssl.client.server_state.FIRST_AVOIDANCE", 1.0)
    with two_servers(tmp_path) as servers, VariantClient(list(servers), deadline_seconds=1.5) as client:
        used_both(client, servers)
        (healthy, _), (stuck, stuck_calls) = servers.items()
        with stopped(stuck_calls()[-1]["pid"]):
            failures = []
            for index in range(6):
                try:
                    client.variants(GREY[:3], index)
                except ServerUnavailableError as error:
                    failures.append(str(error))
        before, ends = len(stuck_calls()), time.monotonic() + 30
        while len(stuck_calls()) < before + 3:
            assert time.monotonic() < ends, "it is asked again"
            client.variants(GREY[:3], 0)
    assert len(failures) == 1
    assert stuck in failures[0]
    assert re.search(r"no answer in 1\.\d+ s", failures[0])
    assert healthy not in failures[0]


def test_the_server_with_the_oldest_unanswered_call_is_named_while_it_waits(tmp_path):
    with two_servers(tmp_path) as servers:
        (_, first_calls), (second, second_calls) = servers.items()

        async def ask() -> str:
            client = AsyncVariantClient(list(servers))
            try:
                ends = time.monotonic() + 20
                while not (first_calls() and second_calls()):  # as in `used_both`
                    assert time.monotonic() < ends
                    await client.variants(GREY[:3], 0)
                with stopped(second_calls()[-1]["pid"]):
                    calls = [asyncio.ensure_future(client.variants(GREY[:3], index)) for index in range(2)]
                    answered, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                    assert (len(answered), len(waiting)) == (1, 1)
                    said = client.state()
                await asyncio.gather(*calls)
                return said
            finally:
                await client.close()

        said = background.run(ask(), 60)
    assert second in said
    assert said.count("the generation server at") == 1


def test_a_server_that_is_silent_for_long_is_doubted_until_it_answers(monkeypatch):
    async def check() -> None:
        target = Target("localhost:1", tls=None, token=None, max_in_flight=2)
        try:
            call = target.begin(4)
            now = time.monotonic()
            assert not target.doubtful(now + SILENT_SECONDS - 1)
            assert target.doubtful(now + SILENT_SECONDS + 1)
            target.end(call, 4)
            assert (target.in_flight, target.outstanding) == (0, 0)
            assert not target.doubtful(now + SILENT_SECONDS + 1)
            assert target.silent(now)
            assert target.silent(now), "in flight together"
            assert target.doubtful(time.monotonic() + FIRST_AVOIDANCE - 1)
            assert not target.doubtful(time.monotonic() + FIRST_AVOIDANCE + 1)
            target.succeeded()
            assert not target.doubtful(time.monotonic())
            assert not target.silent(now), "it has answered since"
        finally:
            await target.channel.close()

    background.run(check(), 20)


def test_advice_is_in_the_words_of_whoever_gave_the_settings():
    async def said(**settings) -> list[str]:
        target = Target("localhost:1", tls=None, token=None, max_in_flight=2, **settings)
        try:
            target.late(0.0, "no answer in 9 s")
            slow = state_of([target])
            target.trouble = "UNAVAILABLE: gone"
            return [slow, state_of([target])]
        finally:
            await target.channel.close()

    for text in background.run(said(), 20):
        assert "variants." not in text
        assert "embedded" not in text
    slow, away = background.run(said(advice=RECIPE_ADVICE), 20)
    assert "raise variants.deadline_seconds" in slow
    assert "variants.server=embedded" in away


def test_overload_lateness_and_silence_are_three_messages():
    async def said() -> list[str]:
        target = Target("localhost:1", tls=None, token=None, max_in_flight=2)
        try:
            silent = target.state()
            target.late(0.0, "no answer in 9 s")
            late = target.state()
            target.refused(0.0, None, "the queue is full")
            return [target.state(), late, silent]
        finally:
            await target.channel.close()

    full, late, silent = background.run(said(), 20)
    assert "has more work than it takes (RESOURCE_EXHAUSTED: the queue is full)" in full
    assert "raise the deadline (deadline_seconds) or its own limits" in full
    assert "is too slow for what is asked (DEADLINE_EXCEEDED: no answer in 9 s)" in late
    assert "use a faster generator" in late
    assert "says nothing of what it was asked" in silent
    assert "it is stuck" in silent


def test_images_are_named_by_their_places_in_the_call(tmp_path):
    images = [GREY[0], GREY[1], GREY[0], GREY[7], GREY[1], GREY[7]]
    told = pytest.raises(RequestRefusedError, match="variant 2 of image 3, image 5: BAD_IMAGE: not to its taste")
    with stub_server(tmp_path, bad=7) as (address, _), VariantClient(address) as client, told:
        client.variants(images, 2)
    large = np.zeros((1, 40, 40), np.uint8)
    told = pytest.raises(RequestRefusedError, match=r"image 2 has 1,600 bytes")
    with stub_server(tmp_path, max_image_bytes=1000) as (address, _), VariantClient(address) as client, told:
        client.variants([GREY[0], GREY[0], large], 0)


@pytest.mark.parametrize("deadline", [None, 30])
def test_a_timeout_of_the_users_own_storage_is_left_as_it_is(tmp_path, deadline):
    def load(row: int):
        raise TimeoutError("the disk does not answer")

    with stub_server(tmp_path) as (address, _):

        async def ask() -> None:
            client = AsyncVariantClient(address)
            try:
                await client.connect()
                wanted = [VariantRequest(0, raw_image(GREY[0]).source_id, 0)]
                await client.generate(await client.find_generator(), wanted, load, {}, deadline=deadline)
            finally:
                await client.close()

        with pytest.raises(TimeoutError, match="the disk does not answer"):
            background.run(ask(), 60)


def test_a_loop_that_does_not_come_to_a_call_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(sync_client, "SLACK_SECONDS", 0.1)
    background.background_loop().call_soon_threadsafe(time.sleep, 1.5)
    told = pytest.raises(ServerUnavailableError, match=r"thread that talks to localhost:1 has not ended the call")
    with VariantClient("localhost:1", deadline_seconds=0.2) as client, told:
        client.variants(GREY[:1], 0)


def test_a_call_that_fails_says_how_often_it_was_repeated(tmp_path):
    with (
        stub_server(tmp_path, refusals=1000, retry_after=0.1) as (address, _),
        VariantClient(address, deadline_seconds=1) as client,
        pytest.raises(ServerUnavailableError) as caught,
    ):
        client.variants(GREY[:1], 0)
    assert caught.value.retries >= 2
