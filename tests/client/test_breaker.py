"""When a server that is away is asked again, and how often that is logged; no clock runs here."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest
from PIL import Image
from stub_server import GREY, stopped, stub_server

from genssl import GenerativeViews, VariantClient
from genssl.client import balancer as target_pool
from genssl.client.breaker import FIRST_PAUSE, LONGEST_PAUSE, REMIND_SECONDS, CircuitBreaker, FallbackLog, Reminder
from genssl.client.source import RemoteSource
from genssl.config.recipe import VariantsConfig
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Server:
    def __init__(self) -> None:
        self.reachable = True
        self.probes = 0

    def __call__(self) -> bool:
        self.probes += 1
        return self.reachable


def test_a_closed_breaker_asks_always_and_probes_nothing():
    server = Server()
    breaker = CircuitBreaker(server, Clock())
    for _ in range(3):
        assert breaker.allows()
        breaker.succeeded()
    assert server.probes == 0


def test_after_a_failure_nothing_is_asked_until_the_server_is_reached_again():
    server, clock = Server(), Clock()
    breaker = CircuitBreaker(server, clock)
    assert breaker.allows()
    server.reachable = False
    breaker.failed()
    for _ in range(100):
        clock.now += 60.0
        assert not breaker.allows()
    server.reachable = True
    assert breaker.allows(), "half open: one call tries"
    assert not breaker.allows(), "and one alone"
    breaker.succeeded()
    assert breaker.allows()
    assert breaker.allows()


def test_a_server_that_is_reached_but_late_each_time_is_tried_ever_more_seldom():
    clock = Clock()
    breaker = CircuitBreaker(Server(), clock)
    pauses = []
    for _ in range(9):
        breaker.failed()
        failed_at = clock.now
        while not breaker.allows():
            clock.now += 0.5
        pauses.append(clock.now - failed_at)
    assert pauses == [0.0, FIRST_PAUSE, 2.0, 4.0, 8.0, 16.0, 32.0, LONGEST_PAUSE, LONGEST_PAUSE]
    breaker.succeeded()
    breaker.failed()
    assert breaker.allows(), "a success begins anew"


def test_what_lasts_is_logged_once_it_lasts_then_every_minute_and_at_its_end():
    clock = Clock()
    reminder = Reminder(after=2.0, clock=clock)
    assert not reminder.lasts()
    assert not reminder.ended(), "what was not logged need not be taken back"
    logged = []
    for _ in range(300):
        if reminder.lasts():
            logged.append(clock.now - 1000.0)
        clock.now += 1.0
    assert logged == [2.0 + REMIND_SECONDS * count for count in range(5)]
    assert reminder.ended()
    assert not reminder.ended()


def test_fallbacks_are_logged_with_their_number_and_their_end(caplog):
    clock = Clock()
    fallbacks = FallbackLog(logging.getLogger("genssl.test"), clock)
    fallbacks.came()
    for _ in range(100):
        fallbacks.fell_back(8, "nobody is there")
        clock.now += 1.0
    fallbacks.came()
    fallbacks.came()
    assert [record.getMessage() for record in caplog.records] == [
        "8 views so far do without their variants (they are counted): nobody is there",
        "488 views so far do without their variants (they are counted): nobody is there",
        "variants come again; 800 views went without",
    ]


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The number of images of every call of a `VariantClient`."""
    calls: list[int] = []
    ask = VariantClient.variants

    def variants(self, images, *arguments, **settings):
        calls.append(len(images.positions))
        return ask(self, images, *arguments, **settings)

    monkeypatch.setattr(VariantClient, "variants", variants)
    return calls


def test_a_server_that_is_stuck_costs_one_deadline_and_not_one_a_batch(tmp_path, counted, caplog):
    pictures = [Image.fromarray(image[0]) for image in GREY]
    with stub_server(tmp_path) as (address, calls):
        views = GenerativeViews(pictures, address, late="real", deadline_seconds=1.0)
        views.__getitems__([0, 1])
        with stopped(calls()[-1]["pid"]):
            del counted[:]
            for first in range(2, 82, 4):
                views.__getitems__(range(first, first + 4))
            assert counted == [4], "the first batch waits, nineteen do not"
            assert views.origins == {"generated": 0, "store": 2, "real": 80}
        ends = time.monotonic() + 60
        while views.origins["store"] == 2:
            assert time.monotonic() < ends, "variants come again"
            views.__getitems__([100, 101])
            time.sleep(0.05)
        views.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "genssl.views.dataset"]
    assert lines[0].startswith("4 views so far do without their variants (they are counted): after 1 s the generation")
    assert lines[-1].startswith("variants come again; ")
    assert len(lines) == 2


def test_a_server_that_was_never_there_costs_one_deadline_too(tmp_path, counted):
    views = GenerativeViews(GREY, f"unix:{tmp_path}/nobody.sock", late="real", deadline_seconds=0.5)
    for first in range(0, 80, 4):
        views.__getitems__(range(first, first + 4))
    views.close()
    assert counted == [4]
    assert views.ledger.origins == {"real": 80}


def test_a_loop_that_waits_logs_that_a_server_is_away_and_back(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(target_pool, "AWAY_SECONDS", 0.0)
    with stub_server(tmp_path) as (address, calls):
        views = GenerativeViews(GREY, address, late="block", deadline_seconds=60)
        views[0]
        pid = calls()[-1]["pid"]
        os.kill(pid, signal.SIGKILL)
        waiting = views._source.submit([GREY[1]], 0)
        ends = time.monotonic() + 30
        while not any(address in record.getMessage() for record in caplog.records):
            assert time.monotonic() < ends
            time.sleep(0.02)
        said = [record for record in caplog.records if address in record.getMessage()]
        assert "gives no answer" in said[0].getMessage()
        assert said[0].levelno == logging.WARNING
        with stub_server(tmp_path, address=address):
            assert waiting.result(60).images.shape[0] == 1
        views.close()
    assert caplog.records[-1].getMessage() == f"the generation server at {address} answers again"


def test_a_run_that_does_not_wait_logs_that_it_goes_on_without_its_server(tmp_path, caplog):
    class Greys:
        def stored(self, row: int):
            from genssl.data.base import raw_image

            return raw_image(GREY[row])

    def requests(step: int) -> list[VariantRequest]:
        return [VariantRequest(row, Greys().stored(row).source_id, step) for row in range(4)]

    with stub_server(tmp_path) as (address, calls):
        config = VariantsConfig(server=address, late="real", deadline_seconds=60)
        source = RemoteSource(
            targets=[address], generator_id="grey", parameters={}, dataset=Greys(), config=config, ledger=Ledger()
        )
        try:
            source.announce(requests(0), 0)
            while not calls():
                time.sleep(0.01)
            os.kill(calls()[-1]["pid"], signal.SIGKILL)
            step, ends = 1, time.monotonic() + 30
            while not any("do without" in record.getMessage() for record in caplog.records):
                assert time.monotonic() < ends
                source.announce(requests(step), step)
                origins = source.take(requests(step), step).origins
                step += 1
                time.sleep(0.01)
        finally:
            source.close()
    assert origins == ["real"] * 4, "at once, as before"
    line = next(record.getMessage() for record in caplog.records if record.name == "genssl.client.source")
    assert line.startswith("4 views so far do without their variants")
    assert address in line
