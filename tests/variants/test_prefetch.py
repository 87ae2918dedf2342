"""The prefetch queue: bounded, in order of the asker, never silent about a failure."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from genssl.errors import ServerUnavailableError
from genssl.variants.prefetch import PrefetchQueue
from genssl.variants.source import VariantRequest


def requests(numbers) -> list[VariantRequest]:
    return [VariantRequest(row=number, source_id=bytes([number] * 16), index=number) for number in numbers]


class Fetcher:
    """Answers with images filled with the request's row, after a delay that makes later pieces arrive first."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.pieces, self.running, self.most_running = delay, [], 0, 0

    async def __call__(self, piece):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.pieces.append([request.row for request in piece])
        try:
            await asyncio.sleep(self.delay / (1 + piece[0].row))
        finally:
            self.running -= 1
        return [(np.full((3, 2, 2), request.row, np.uint8), "generated") for request in piece]


@pytest.fixture
def queue_of():
    opened = []

    def make(fetch, **changes) -> PrefetchQueue:
        settings = {"rows_per_request": 4, "max_in_flight": 2, "deadline_seconds": 5.0}
        opened.append(PrefetchQueue(fetch, **{**settings, **changes}))
        return opened[-1]

    yield make
    for queue in opened:
        queue.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "genssl-prefetch"], (
        "a loop thread was left"
    )


def rows_in(delivery) -> list[int]:
    return delivery.images[:, 0, 0, 0].tolist()


def test_variants_come_in_the_order_of_the_step_whatever_the_order_of_arrival(queue_of):
    fetch = Fetcher(delay=0.2)
    queue = queue_of(fetch, max_in_flight=8)
    queue.plan(requests(range(10)))
    assert rows_in(queue.take(requests([9, 0, 5, 1]))) == [9, 0, 5, 1]
    assert rows_in(queue.take(requests([2, 3, 4, 6, 7, 8]))) == [2, 3, 4, 6, 7, 8]
    assert sorted(len(piece) for piece in fetch.pieces) == [2, 4, 4]


def test_pieces_under_way_are_bounded(queue_of):
    fetch = Fetcher(delay=0.05)
    queue = queue_of(fetch, rows_per_request=1, max_in_flight=3)
    queue.plan(requests(range(20)))
    queue.take(requests(range(20)))
    assert fetch.most_running == 3


def test_planning_starts_the_work_before_it_is_taken(queue_of):
    fetch = Fetcher()
    queue = queue_of(fetch)
    queue.plan(requests([1]))
    deadline = time.monotonic() + 5
    while not fetch.pieces and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fetch.pieces == [[1]]


def test_a_variant_wanted_by_two_steps_is_fetched_once_and_then_forgotten(queue_of):
    fetch = Fetcher()
    queue = queue_of(fetch)
    queue.plan(requests([1]))
    queue.plan(requests([1]))
    assert rows_in(queue.take(requests([1]))) == [1]
    assert rows_in(queue.take(requests([1]))) == [1]
    assert fetch.pieces == [[1]]
    queue.take(requests([1]))  # announced no more: fetched anew
    assert fetch.pieces == [[1], [1]]


def test_a_failed_fetch_fails_the_step_that_wants_it(queue_of):
    async def fail(piece):
        raise ServerUnavailableError("gone")

    queue = queue_of(fail)
    queue.plan(requests([1]))
    with pytest.raises(ServerUnavailableError, match="gone"):
        queue.take(requests([1]))


def test_waiting_ends_at_the_deadline_with_what_to_do(queue_of):
    queue = queue_of(Fetcher(delay=60.0), deadline_seconds=0.5, describe=lambda: "ask the server")
    started = time.monotonic()
    with pytest.raises(
        ServerUnavailableError, match=r"2 variants of this step were still missing after 0.5 s: ask the server"
    ):
        queue.take(requests([1, 2]))
    assert time.monotonic() - started < 3


def test_waiting_ends_at_once_when_the_check_says_so(queue_of):
    def dead() -> None:
        raise ServerUnavailableError("the server process ended")

    queue = queue_of(Fetcher(delay=60.0), deadline_seconds=60.0, check=dead)
    started = time.monotonic()
    with pytest.raises(ServerUnavailableError, match="process ended"):
        queue.take(requests([1]))
    assert time.monotonic() - started < 3


def test_a_failing_setup_leaves_no_thread(queue_of):
    async def setup() -> None:
        raise ServerUnavailableError("no such server")

    queue = queue_of(Fetcher())
    with pytest.raises(ServerUnavailableError, match="no such server"):
        queue.run_first(setup())
    assert not [thread for thread in threading.enumerate() if thread.name == "genssl-prefetch"]


def test_closing_cancels_what_is_under_way(queue_of):
    fetch = Fetcher(delay=60.0)
    queue = queue_of(fetch)
    queue.plan(requests(range(8)))
    started = time.monotonic()
    queue.close()
    assert time.monotonic() - started < 3
    assert fetch.running == 0
