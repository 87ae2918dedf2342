"""Places for messages on their way in: no connection has all of them, and half change hands quickly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from genssl.server.transport.reception import Place, Reception


class Sender:
    """A message that takes a place and keeps it until it is told to end."""

    def __init__(self, reception: Reception, connection: str, holder: str = "host") -> None:
        self.entered, self._end = asyncio.Event(), asyncio.Event()
        self.place: Place | None = None
        self.task = asyncio.ensure_future(self._send(reception, holder, connection))

    async def _send(self, reception: Reception, holder: str, connection: str) -> None:
        async with reception.place(holder, connection) as self.place:
            self.entered.set()
            await self._end.wait()

    async def finish(self) -> None:
        self._end.set()
        await self.task


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def inside(senders: list[Sender]) -> int:
    return sum(sender.entered.is_set() and not sender.task.done() for sender in senders)


async def stop(*senders: Sender) -> None:
    for sender in senders:
        sender.task.cancel()
    await asyncio.gather(*(sender.task for sender in senders), return_exceptions=True)


def test_one_connection_never_has_all_places():
    async def test() -> None:
        reception = Reception(8)
        greedy = [Sender(reception, "greedy") for _ in range(30)]
        await settle()
        assert inside(greedy) == 4
        other = Sender(reception, "other")
        await settle()
        assert inside([other]) == 1
        assert reception.taken == 5
        await stop(*greedy, other)
        assert reception.taken == 0

    run(test)


def test_who_held_places_for_the_shortest_time_is_next():
    async def test() -> None:
        now = 0.0
        reception = Reception(2, lambda: now)
        slow = [Sender(reception, f"slow{number % 2}") for number in range(8)]
        await settle()
        now = 10.0
        await slow[0].finish()
        await settle()
        quick = Sender(reception, "quick")
        await settle()
        assert inside([*slow, quick]) == 2
        await slow[1].finish()
        await settle()
        assert inside([quick]) == 1, "both others had ten seconds each"
        await stop(*slow, quick)

    run(test)


def test_places_are_kept_for_long_by_half_at_most():
    async def test() -> None:
        reception = Reception(8)
        senders = [Sender(reception, f"c{number}") for number in range(6)]
        await settle()
        assert [sender.place.keep_for_long() for sender in senders] == [True] * 4 + [False] * 2
        await senders[0].finish()
        assert senders[5].place.keep_for_long()
        await stop(*senders)
        one = [Sender(reception, "one") for _ in range(4)]
        await settle()
        assert [sender.place.keep_for_long() for sender in one] == [True, True, False, False]
        await stop(*one)

    run(test)


def test_a_sender_that_is_gone_before_its_turn_takes_none():
    async def test() -> None:
        reception = Reception(2)
        first, second, gone, last = (Sender(reception, name) for name in "abcd")
        await settle()
        await stop(gone)
        await first.finish()
        await settle()
        assert inside([second, last]) == 2
        await stop(second, last)
        assert reception.taken == 0

    run(test)


def test_a_place_is_kept_until_its_message_has_ended_though_its_call_is_over():
    async def test() -> None:
        reception = Reception(2)
        reading = asyncio.get_running_loop().create_future()
        async with reception.place("host", "slow") as place:
            place.reading = reading
        assert reception.taken == 1
        reading.set_result(None)
        await settle()
        assert reception.taken == 0

    run(test)
