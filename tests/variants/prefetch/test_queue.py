"""The prefetch queue: bounded, in order of the asker, never silent about a failure."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from genssl.errors import RequestRefusedError, ServerUnavailableError
from genssl.variants.ledger import Ledger
from genssl.variants.prefetch.loop import run
from genssl.variants.prefetch.queue import PrefetchQueue
from genssl.variants.source import VariantRequest


def requests(numbers) -> list[VariantRequest]:
    return [VariantRequest(row=number, source_id=bytes([number] * 16), index=number) for number in numbers]


class Fetcher:
    """Answers with images filled with the request's row, after a delay that makes later pieces arrive first."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay, self.pieces, self.running, self.most_running = delay, [], 0, 0

    async def __call__(self, piece, ahead=False):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.pieces.append([request.row for request in piece])
        try:
            await asyncio.sleep(self.delay / (1 + piece[0].row))
        finally:
            self.running -= 1
        return [(np.full((3, 2, 2), request.row, np.uint8), "generated") for request in piece]


class Received:
    """Stands in a pool's place and notes the rows of what arrives."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    def add_many(self, names, images, step) -> None:
        self.rows += [index for _, index in names]


@pytest.fixture
def queue_of():
    opened = []

    def make(fetch, *, check=lambda: None, describe=lambda: "", **changes) -> PrefetchQueue:
        settings = {"rows_per_request": 4, "max_in_flight": 2, "deadline_seconds": 5.0}
        fetcher = SimpleNamespace(fetch=fetch, check=check, describe=describe)
        opened.append(PrefetchQueue(fetcher, **{**settings, **changes}))
        return opened[-1]

    yield make
    for queue in opened:
        queue.close()
    assert not others_on_the_loop(), "work was left on the loop"


def others_on_the_loop() -> set[asyncio.Task]:
    async def running() -> set[asyncio.Task]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    return run(running())


def rows_in(images) -> list[int | None]:
    return [None if image is None else int(image[0][0, 0, 0]) for image in images]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_variants_come_in_the_order_of_the_step_whatever_the_order_of_arrival(queue_of):
    fetch = Fetcher(delay=0.2)
    queue = queue_of(fetch, max_in_flight=8)
    queue.announce(requests(range(10)))
    assert rows_in(queue.take(requests([9, 0, 5, 1]))) == [9, 0, 5, 1]
    assert rows_in(queue.take(requests([2, 3, 4, 6, 7, 8]))) == [2, 3, 4, 6, 7, 8]
    assert sorted(len(piece) for piece in fetch.pieces) == [2, 4, 4]


def test_pieces_under_way_are_bounded(queue_of):
    fetch = Fetcher(delay=0.05)
    queue = queue_of(fetch, rows_per_request=1, max_in_flight=3)
    queue.announce(requests(range(20)))
    queue.take(requests(range(20)))
    assert fetch.most_running == 3


def test_planning_starts_the_work_before_it_is_taken(queue_of):
    fetch = Fetcher()
    queue = queue_of(fetch)
    queue.announce(requests([1]))
    wait_for(lambda: fetch.pieces == [[1]])


def test_a_variant_wanted_by_two_steps_is_fetched_once_and_then_forgotten(queue_of):
    fetch = Fetcher()
    queue = queue_of(fetch)
    queue.announce(requests([1]))
    queue.announce(requests([1]))
    assert rows_in(queue.take(requests([1]))) == [1]
    assert rows_in(queue.take(requests([1]))) == [1]
    assert fetch.pieces == [[1]]
    queue.take(requests([1]))  # announced no more: fetched anew
    assert fetch.pieces == [[1], [1]]


def test_a_failed_fetch_fails_the_step_that_wants_it(queue_of):
    async def fail(piece, ahead=False):
        raise ServerUnavailableError("gone")

    queue = queue_of(fail)
    queue.announce(requests([1]))
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


def test_a_failing_setup_says_why_and_leaves_the_loop_to_others(queue_of):
    async def setup() -> None:
        raise ServerUnavailableError("no such server")

    queue, other = queue_of(Fetcher()), queue_of(Fetcher())
    with pytest.raises(ServerUnavailableError, match="no such server"):
        queue.run_first(setup())
    queue.close()
    assert rows_in(other.take(requests([1]))) == [1]


def test_closing_cancels_what_is_under_way(queue_of):
    fetch = Fetcher(delay=60.0)
    queue = queue_of(fetch)
    queue.announce(requests(range(8)))
    started = time.monotonic()
    queue.close()
    assert time.monotonic() - started < 3
    assert fetch.running == 0


# ---- Steps that do not wait: late: reuse and real ----


class Gate(Fetcher):
    """Answers a piece when its number is released; pieces are numbered in the order in which they were sent."""

    def __init__(self) -> None:
        super().__init__()
        self.released: set[int] = set()

    async def __call__(self, piece, ahead=False):
        number = len(self.pieces)
        self.pieces.append([request.row for request in piece])
        while number not in self.released:
            await asyncio.sleep(0.002)
        return [(np.full((3, 2, 2), request.row, np.uint8), "generated") for request in piece]


@pytest.fixture
def gated(queue_of):
    """Returns a queue with one piece of four in flight, its gate, its ledger, and the rows received."""

    def make(**changes):
        gate, ledger, received = Gate(), Ledger(), []
        queue = queue_of(
            gate,
            max_in_flight=1,
            newest_first=True,
            ledger=ledger,
            pool=Received(received),
            **changes,
        )
        return queue, gate, ledger, received

    return make


def test_a_step_that_does_not_wait_gets_what_is_there(gated):
    queue, gate, ledger, received = gated()
    queue.announce(requests([0, 1, 2, 3]), 0)
    queue.announce(requests([4, 5]), 0)
    wait_for(lambda: len(gate.pieces) == 1)
    gate.released.add(0)
    wait_for(lambda: len(gate.pieces) == 2)
    started = time.monotonic()
    assert rows_in(queue.take_ready(requests([5, 0, 4, 3]), 0)[0]) == [None, 0, None, 3]
    assert time.monotonic() - started < 0.1
    assert ledger.variants_dropped == 0, "what is under way is not dropped"
    gate.released.add(1)
    wait_for(lambda: received == [0, 1, 2, 3, 4, 5])


def test_what_passed_unsent_is_dropped_and_the_newest_step_is_asked_for_first(gated):
    queue, gate, ledger, received = gated()
    queue.announce(requests([0, 1]), 0)
    wait_for(lambda: gate.pieces == [[0, 1]])
    for step in (1, 2, 3):
        queue.announce(requests([10 * step, 10 * step + 1]), step)
    assert rows_in(queue.take_ready(requests([0, 1]), 0)[0]) == [None, None]
    images, dropped = queue.take_ready(requests([10, 11]), 1)
    assert images == [None, None]
    assert ledger.variants_dropped == 2
    assert dropped == requests([10, 11])
    gate.released.update({0, 1, 2})
    wait_for(lambda: received == [0, 1, 30, 31, 20, 21])
    assert gate.pieces == [[0, 1], [30, 31], [20, 21]]
    assert rows_in(queue.take_ready(requests([20, 21]), 2)[0]) == [20, 21]
    assert rows_in(queue.take_ready(requests([30, 31]), 3)[0]) == [30, 31]
    assert queue._slots == {}


def test_a_backlog_does_not_grow_with_the_steps_of_a_stuck_server(gated):
    queue, gate, ledger, _ = gated()
    for step in range(300):
        queue.announce([VariantRequest(row, bytes([row] * 16), step) for row in range(8)], step)
        if step >= 4:
            passed = step - 4
            queue.take_ready([VariantRequest(r, bytes([r] * 16), passed) for r in range(8)], passed)
    assert len(queue._slots) <= 5 * 8 + 4
    assert ledger.variants_dropped >= 295 * 8 - 8
    assert len(gate.pieces) == 1


def test_a_dropped_variant_that_a_later_step_wants_too_is_kept_for_it(gated):
    queue, gate, ledger, received = gated()
    queue.announce(requests([9]), 0)
    wait_for(lambda: gate.pieces == [[9]])
    queue.announce(requests([1, 2]), 1)
    queue.announce(requests([1, 3]), 2)
    queue.take_ready(requests([1, 2]), 1)
    assert ledger.variants_dropped == 1
    gate.released.update({0, 1})
    wait_for(lambda: sorted(received) == [1, 3, 9])
    assert rows_in(queue.take_ready(requests([3, 1]), 2)[0]) == [3, 1]


def test_nothing_at_all_for_the_deadline_ends_the_run(gated):
    queue, *_ = gated(deadline_seconds=0.3, describe=lambda: "ask the server")
    queue.announce(requests([1]), 0)
    assert rows_in(queue.take_ready(requests([1]), 0)[0]) == [None]
    time.sleep(0.4)
    queue.announce(requests([2]), 1)
    with pytest.raises(ServerUnavailableError, match="no variant at all has come for 0 s: ask the server"):
        queue.take_ready(requests([2]), 1)


def test_a_dead_server_ends_steps_that_do_not_wait_too(gated):
    def dead() -> None:
        raise ServerUnavailableError("the server process ended")

    queue, *_ = gated(check=dead)
    with pytest.raises(ServerUnavailableError, match="process ended"):
        queue.take_ready(requests([1]), 0)


def test_a_refusal_is_told_even_when_the_step_that_asked_has_passed(queue_of):
    async def refuse(piece, ahead=False):
        await asyncio.sleep(0.05)
        raise RequestRefusedError("no such parameter")

    queue = queue_of(refuse, newest_first=True)
    queue.announce(requests([1]), 0)
    assert rows_in(queue.take_ready(requests([1]), 0)[0]) == [None]
    wait_for(lambda: queue._failure is not None)
    with pytest.raises(RequestRefusedError, match="no such parameter"):
        queue.take_ready(requests([2]), 1)


class HeldUpLock:
    """A lock that holds up the loop's thread once before it gets it, as a scheduler may."""

    def __init__(self) -> None:
        self.lock, self.armed, self.trainer = threading.Lock(), threading.Event(), threading.current_thread()

    def __enter__(self) -> None:
        if threading.current_thread() is not self.trainer and self.armed.is_set():
            self.armed.clear()
            time.sleep(0.2)
        self.lock.acquire()

    def __exit__(self, *_) -> None:
        self.lock.release()


def test_a_variant_announced_anew_as_it_arrives_is_not_forgotten(gated):
    queue, gate, _, received = gated()
    queue._lock = lock = HeldUpLock()
    queue.announce(requests([1]), 0)
    arriving = queue._slots[bytes([1] * 16), 1].future
    wait_for(lambda: len(gate.pieces) == 1)
    lock.armed.set()
    gate.released.add(0)
    arriving.result(timeout=5)
    assert rows_in(queue.take_ready(requests([1]), 0)[0]) == [1]
    queue.announce(requests([2]), 3)
    queue.announce(requests([1]), 2)
    wait_for(lambda: not lock.armed.is_set() and received == [1])
    gate.released.update({1, 2})
    wait_for(lambda: received in ([1, 2, 1], [1, 1, 2]))
    assert rows_in(queue.take_ready(requests([1]), 2)[0]) == [1]
    assert rows_in(queue.take_ready(requests([2]), 3)[0]) == [2]
    assert queue._slots == {}


def test_the_first_failure_is_told_not_those_that_follow_from_it(queue_of):
    failures = iter([RequestRefusedError("the cause"), AttributeError("what follows")])

    def refuse(names, images, step):
        raise next(failures)

    queue = queue_of(Fetcher(), newest_first=True, pool=SimpleNamespace(add_many=refuse))
    for step in (0, 1):
        queue.announce(requests([step]), step)
        wait_for(lambda: queue._in_flight == 0 and not queue._unsent)
    assert next(failures, None) is None
    with pytest.raises(RequestRefusedError, match="the cause"):
        queue.take_ready(requests([0]), 0)


def test_a_fetch_that_brings_too_few_fails_the_step(queue_of):
    async def fetch(piece, ahead=False):
        return [(np.zeros((3, 2, 2), np.uint8), "generated")]

    queue = queue_of(fetch)
    with pytest.raises(RuntimeError, match="2 variants were fetched and 1 came"):
        queue.take(requests([1, 2]))


def test_refreshing_waits_for_the_plan_and_is_counted(queue_of):
    gate, ledger, received, bulk = Gate(), Ledger(), [], []

    async def fetch(piece, ahead):
        if not ahead:
            return await gate(piece)
        bulk.append([request.row for request in piece])
        return [(np.full((3, 2, 2), request.row, np.uint8), "generated") for request in piece]

    queue = queue_of(
        fetch,
        max_in_flight=1,
        ledger=ledger,
        pool=Received(received),
    )
    queue.announce(requests([0, 1]), 0)
    queue.announce(requests([2]), 1)
    wait_for(lambda: gate.pieces == [[0, 1]])
    queue.refresh(requests([7, 8]))
    assert not queue.idle
    time.sleep(0.05)
    assert bulk == [], "a variant of the plan waits to be sent"
    gate.released.update({0, 1})
    wait_for(lambda: sorted(received) == [0, 1, 2, 7, 8])
    assert bulk == [[7, 8]]
    assert queue.idle
    assert ledger.variants_refreshed == 2
    assert len(ledger.fetch_seconds) == 2
    assert rows_in(queue.take(requests([0, 1]))) == [0, 1]


def test_latencies_are_measured_from_sending_to_arrival(queue_of):
    ledger = Ledger()
    queue = queue_of(Fetcher(delay=0.2), rows_per_request=1, max_in_flight=1, ledger=ledger)
    queue.announce(requests([0, 0 + 200]))
    queue.take(requests([0, 200]))
    assert 0.2 <= ledger.fetch_seconds[0] < 1.0
    assert ledger.fetch_seconds[1] < 0.2, "the time a piece waits to be sent is not the server's"
