"""Every fault under every lateness policy, against real server processes: each ends as its policy says, and is counted.

Six steps over the same twelve sources; the fault comes after the third, when the pool has three variants of each.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from genssl.client.source import RemoteSource
from genssl.config.recipe import VariantsConfig
from genssl.errors import ServerUnavailableError
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.source import VariantRequest

SOURCES, STEPS, HEALTHY = 12, 6, 3
POLICIES = ("block", "reuse", "real")


@pytest.fixture(scope="module")
def expected(unclip, digits_train):
    """Variants of the sources by index, made in this process."""
    source = InProcessSource(VariantEngine(unclip, [1, 4, 16]), digits_train, Ledger())
    requests = [requests_of(digits_train, index) for index in range(STEPS)]
    return [source.take(step).images for step in requests]


def requests_of(dataset, step: int) -> list[VariantRequest]:
    return [VariantRequest(row, dataset.source_id(row), step) for row in range(SOURCES)]


@pytest.fixture(scope="module")
def survivor(start_server, tmp_path_factory):
    """A server that forgets what it made and lets four variants a client wait; its faults pass."""
    settings = ["limits.max_queued_variants_per_client=4", "memory_cache_bytes=0"]
    with start_server(tmp_path_factory.mktemp("server"), *settings) as server:
        server.wait_until_serving()
        yield server


@contextmanager
def open_source(address: str, dataset, late: str, **settings):
    config = VariantsConfig(**{"late": late, "rows_per_request": 4, "deadline_seconds": 60} | settings)
    ledger = Ledger()
    pool = (
        VariantPool(None, max_bytes=2**20, max_reuse=config.max_reuse, max_age_steps=None) if late == "reuse" else None
    )
    source = RemoteSource(
        targets=[address],
        generator_id="stable_unclip",
        parameters={},
        dataset=dataset,
        config=config,
        ledger=ledger,
        pool=pool,
    )
    try:
        yield source, ledger
    finally:
        source.close()


def take(source, ledger, dataset, step: int, expected) -> float:
    """Takes a step as the training does; checks what came, and returns the seconds it took."""
    started = time.monotonic()
    requests = requests_of(dataset, step)
    delivery = source.take(requests, step)
    seconds = time.monotonic() - started
    assert len(delivery.origins) == len(delivery.indices) == SOURCES, "no variant is lost silently"
    images = iter(delivery.images)
    for slot, (request, origin, index) in enumerate(zip(requests, delivery.origins, delivery.indices, strict=True)):
        ledger.deliver(request.source_id, index, origin)
        if origin == "real":
            continue
        assert (index == step) == (origin != "reused")
        difference = np.abs(next(images).astype(int) - expected[index][slot])
        assert difference.max() <= 1, "whatever is delivered is the variant that its index names"
    return seconds


def walk_healthily(source, ledger, dataset, expected) -> None:
    """The first steps, with everything in time."""
    for step in range(HEALTHY):
        source.announce(requests_of(dataset, step), step)
        while not all_here(source, dataset, step):
            time.sleep(0.01)
        take(source, ledger, dataset, step, expected)
    assert ledger.origins["generated"] + ledger.origins["store"] == HEALTHY * SOURCES


def all_here(source, dataset, step: int) -> bool:
    slots = [source._queue._slots.get((request.source_id, request.index)) for request in requests_of(dataset, step)]
    return all(slot is not None and slot.future.done() for slot in slots)


def counted(ledger: Ledger) -> Counter:
    assert sum(ledger.origins.values()) == STEPS * SOURCES
    return ledger.origins


@pytest.mark.slow
@pytest.mark.parametrize("late", POLICIES)
def test_a_network_pause(survivor, digits_train, expected, late):
    with open_source(survivor.address, digits_train, late, max_in_flight=1) as (source, ledger):
        walk_healthily(source, ledger, digits_train, expected)
        os.kill(survivor.process.pid, signal.SIGSTOP)
        resume = threading.Timer(2.0, os.kill, (survivor.process.pid, signal.SIGCONT))
        resume.start()
        seconds = []
        for step in range(HEALTHY, STEPS):
            source.announce(requests_of(digits_train, step), step)
            seconds.append(take(source, ledger, digits_train, step, expected))
        resume.join()
    check(late, counted(ledger), seconds, pause=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("late", ["block", "reuse"])
def test_kill_9_and_a_new_server_at_the_address(start_server, tmp_path, digits_train, expected, late):
    address = f"unix:{tmp_path}/socket"
    with ExitStack() as stack:
        first = stack.enter_context(start_server(tmp_path, address=address))
        source, ledger = stack.enter_context(open_source(address, digits_train, late))
        walk_healthily(source, ledger, digits_train, expected)
        first.stop(signal.SIGKILL)
        second = threading.Thread(target=lambda: stack.enter_context(start_server(tmp_path, address=address)))
        second.start()
        seconds = []
        for step in range(HEALTHY, STEPS):
            source.announce(requests_of(digits_train, step), step)
            seconds.append(take(source, ledger, digits_train, step, expected))
        second.join()
        if late == "block":
            assert ledger.retries_by_kind["away"] > 0
        check(late, counted(ledger), seconds, pause=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("late", ["block", "reuse"])
def test_a_server_that_never_comes_back_ends_the_run_at_the_deadline(
    start_server, tmp_path, digits_train, expected, late
):
    with (
        start_server(tmp_path) as server,
        open_source(server.address, digits_train, late, deadline_seconds=2) as (source, ledger),
    ):
        walk_healthily(source, ledger, digits_train, expected)
        server.stop(signal.SIGKILL)
        started = time.monotonic()

        def train_on() -> None:
            for step in range(HEALTHY, 1000):
                source.announce(requests_of(digits_train, step), step)
                source.take(requests_of(digits_train, step), step)
                time.sleep(0.05)

        with pytest.raises(ServerUnavailableError, match=r"no answer .*Start it again with"):
            train_on()
        assert 1.5 < time.monotonic() - started < 6


@pytest.mark.slow
@pytest.mark.parametrize("late", POLICIES)
def test_a_full_queue(survivor, digits_train, expected, late):
    with open_source(survivor.address, digits_train, late, max_in_flight=6) as (source, ledger):
        walk_healthily(source, ledger, digits_train, expected)
        seconds = []
        for step in range(HEALTHY, STEPS):
            source.announce(requests_of(digits_train, step), step)
            seconds.append(take(source, ledger, digits_train, step, expected))
        assert ledger.retries_by_kind["full"] > 0
    check(late, counted(ledger), seconds, pause=0.0)


def check(late: str, origins: Counter, seconds: list[float], pause: float) -> None:
    """Blocking waits for everything; the others wait for nothing and say what they took."""
    if late == "block":
        assert origins["generated"] + origins["store"] == STEPS * SOURCES
        assert max(seconds) >= pause * 0.5
        return
    assert max(seconds) < 0.5
    other = "reused" if late == "reuse" else "real"
    assert origins[other] >= SOURCES, "the first step after the fault had nothing new"
    assert origins["generated"] + origins["store"] + origins[other] == STEPS * SOURCES
