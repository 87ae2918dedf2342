"""Who goes next: holders take turns by what they have used, and within each holder its clients.

This is start-time fair queueing (Goyal, Vin and Cheng 1996): whoever used least goes first, and who comes back after a
pause starts beside those who stayed, neither behind them nor with what it did not use meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
REMEMBERED = 1024  # names of which nothing waits and whose use is still known; fewer have tokens, but machines are many


class FairUsage:
    """What each name has used of something scarce, on a scale that newcomers join at the level of those served."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._level = 0.0

    def __len__(self) -> int:
        return len(self._used)

    def of(self, name: str) -> float:
        """Returns what a name that has joined has used."""
        return self._used[name]

    def join(self, name: str) -> None:
        """Notes that something of a name waits from now on."""
        self.charge(name, 0.0)

    def advance(self, level: float) -> None:
        """Lifts the level at which newcomers join."""
        self._level = max(self._level, level)

    def charge(self, name: str, cost: float) -> None:
        """Adds to what a name has used."""
        self._used[name] = max(self._used.pop(name, 0.0), self._level) + cost

    def clear(self) -> None:
        """Starts anew, since nothing waits."""
        self._used.clear()
        self._level = 0.0

    def forget(self, waiting: Collection[str]) -> None:
        """Once there are many names of which nothing waits, forgets all but the latest of them."""
        if len(self._used) <= 2 * len(waiting) + REMEMBERED:
            return
        idle = [name for name in self._used if name not in waiting]
        for name in idle[: -REMEMBERED // 2]:
            del self._used[name]


class Turns(Generic[Thing]):
    """Things that wait for something scarce; first come, first served within a client."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, deque[Thing]]] = {}
        self._holders, self._clients = FairUsage(), dict[str, FairUsage]()

    def add(self, holder: str, client: str, thing: Thing) -> None:
        """Puts a thing behind its client's others."""
        if holder not in self._waiting:
            self._waiting[holder] = {}
            self._holders.join(holder)
        clients, used = self._waiting[holder], self._clients.setdefault(holder, FairUsage())
        if client not in clients:
            clients[client] = deque()
            used.join(client)
        clients[client].append(thing)

    def take(self, allowed: Callable[[Thing], bool] = lambda thing: True) -> tuple[str, str, Thing] | None:
        """Takes out the thing whose turn it is, with its holder and client; None if none may go.

        Clients whose first thing is not `allowed` to go now let others pass.
        """
        for holder in sorted(self._waiting, key=self._holders.of):
            clients, used = self._waiting[holder], self._clients[holder]
            client = min((name for name in clients if allowed(clients[name][0])), key=used.of, default=None)
            if client is None:
                continue
            thing = clients[client].popleft()
            used.advance(used.of(client))
            self._holders.advance(self._holders.of(holder))
            if not clients[client]:
                del clients[client]
            if not clients:
                del self._waiting[holder]
            return holder, client, thing
        return None

    def charge(self, holder: str, client: str, cost: float) -> None:
        """Counts what a turn used against a holder and its client."""
        used = self._clients.setdefault(holder, FairUsage())
        self._holders.charge(holder, cost)
        used.charge(client, cost)
        self._holders.forget(self._waiting)
        used.forget(self._waiting.get(holder, {}))
        if len(self._clients) > 2 * REMEMBERED:
            for name in [name for name in self._clients if name not in self._waiting][:-REMEMBERED]:
                del self._clients[name]

    def __bool__(self) -> bool:
        return bool(self._waiting)
