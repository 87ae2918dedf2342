"""Which messages come in: as many at once as memory is set aside for, and whose turn it is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from genssl.server.batching.turns import Turns


class Place:
    """Room for one message that comes in.

    Attributes:
        reading: what must have ended before the place is free again: set it to keep the place until the message has
            ended, whole or not, even if nobody waits for it any more.
    """

    def __init__(self, reception: Reception, connection: str) -> None:
        self._reception, self._connection = reception, connection
        self.long = False  # whether it is one of those for messages that take long
        self.reading: asyncio.Future[Any] | None = None

    def keep_for_long(self) -> bool:
        """Keeps the place for longer; says whether that may be."""
        self.long = self._reception.keep_for_long(self._connection)
        return self.long


class Reception:
    """Places for messages that are not finished yet. Lives on one event loop.

    Nothing but a window of a message comes in before it has a place, and its size is not known before it is finished:
    a place is for one of the largest. Whoever held places for the shortest time is next; and a connection may hold
    only as many as it leaves free (Choudhury and Hahne 1998), so that one alone never has all of them. Half of the
    places are for messages that take long, and the others change hands often, whatever those who have them do.

    Args:
        places: how many messages may be on their way in at once.
        clock: seconds that never go back.
    """

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._free, self._free_long, self._clock = places, places // 2, clock
        self._held: Counter[str] = Counter()
        self._held_long: Counter[str] = Counter()
        self._turns: Turns[tuple[str, asyncio.Future[None]]] = Turns()
        self.taken = 0

    @asynccontextmanager
    async def place(self, holder: str, connection: str) -> AsyncIterator[Place]:
        """Waits for a place, and holds it until the block ends, or later; see `Place.reading`.

        All clients at a Unix socket count as one connection.
        """
        if not self._turns and self._held[connection] < self._free:
            self._hold(connection)
        else:
            await self._wait(holder, connection)
        place, started = Place(self, connection), self._clock()

        def leave(_: object = None) -> None:
            if place.long:
                self._count_long(connection, -1)
            self._return(holder, connection, self._clock() - started)

        try:
            yield place
        finally:
            if place.reading is None or place.reading.done():
                leave()
            else:
                place.reading.add_done_callback(leave)

    def keep_for_long(self, connection: str) -> bool:
        """Lets a connection keep a place for longer, if that may be."""
        may = self._held_long[connection] < self._free_long
        if may:
            self._count_long(connection, 1)
        return may

    async def _wait(self, holder: str, connection: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._turns.add(holder, connection, (connection, turn))
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._return(holder, connection, 0.0)
            raise

    def _hold(self, connection: str) -> None:
        self._free -= 1
        self.taken += 1
        self._held[connection] += 1

    def _grant(self) -> None:
        while self._free:
            taken = self._turns.take(lambda waiting: self._held[waiting[0]] < self._free)
            if taken is None:
                return
            _, connection, (_, turn) = taken
            if turn.cancelled():
                continue
            self._hold(connection)
            turn.set_result(None)

    def _count_long(self, connection: str, places: int) -> None:
        self._free_long -= places
        self._held_long[connection] += places
        if not self._held_long[connection]:
            del self._held_long[connection]

    def _return(self, holder: str, connection: str, seconds: float) -> None:
        self._free += 1
        self.taken -= 1
        self._held[connection] -= 1
        if not self._held[connection]:
            del self._held[connection]
        self._turns.charge(holder, connection, seconds)
        self._grant()
