"""Who goes next: holders take turns by what they have used, and within each holder its clients.

This is start-time fair queueing (Goyal, Vin and Cheng 1996): whoever used least goes first, and who comes back after a
pause starts beside those who stayed, neither behind them nor with what it did not use meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container
from typing import Generic, TypeVar

Thing = TypeVar("Thing")
REMEMBERED = 1024  # names of which nothing waits, at least; at most twice as many


class _Used:
    """What each name of one level has used, on a scale that moves on with those who are served."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._now = 0.0

    def of(self, name: str) -> float:
        return self._used[name]

    def join(self, name: str) -> None:
        """Notes that something of a name waits from now on."""
        self.charge(name, 0.0)

    def served(self, name: str) -> None:
        self._now = max(self._now, self._used[name])

    def charge(self, name: str, cost: float) -> None:
        self._used[name] = max(self._used.pop(name, 0.0), self._now) + cost

    def forget(self, waiting: Container[str]) -> None:
        """Forgets names of which nothing waits, but for the latest; looks at them only once there are many."""
        if len(self._used) <= 2 * REMEMBERED:
            return
        idle = [name for name in self._used if name not in waiting]
        for name in idle[: max(0, len(idle) - REMEMBERED)]:
            del self._used[name]


class Turns(Generic[Thing]):
    """Things that wait for something scarce; first come, first served within a client."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, deque[Thing]]] = {}
        self._holders, self._clients = _Used(), dict[str, _Used]()

    def add(self, holder: str, client: str, thing: Thing) -> None:
        """Puts a thing behind its client's others."""
        if holder not in self._waiting:
            self._waiting[holder] = {}
            self._holders.join(holder)
        clients, used = self._waiting[holder], self._clients.setdefault(holder, _Used())
        if client not in clients:
            clients[client] = deque()
            used.join(client)
        clients[client].append(thing)

    def take(self, allowed: Callable[[Thing], bool] = lambda thing: True) -> tuple[str, str, Thing] | None:
        """Takes out the thing whose turn it is, with its holder and client; None if none may go.

        Args:
            allowed: says whether the first thing of a client may go now; if not, others go before it.
        """
        for holder in sorted(self._waiting, key=self._holders.of):
            clients, used = self._waiting[holder], self._clients[holder]
            client = min((name for name in clients if allowed(clients[name][0])), key=used.of, default=None)
            if client is None:
                continue
            thing = clients[client].popleft()
            used.served(client)
            self._holders.served(holder)
            if not clients[client]:
                del clients[client]
            if not clients:
                del self._waiting[holder]
            return holder, client, thing
        return None

    def charge(self, holder: str, client: str, cost: float) -> None:
        """Counts what a turn used against a holder and its client."""
        used = self._clients.get(holder)
        if used is None:
            used = self._clients[holder] = _Used()
        self._holders.charge(holder, cost)
        used.charge(client, cost)
        self._holders.forget(self._waiting)
        used.forget(self._waiting.get(holder, {}))
        if len(self._clients) > 2 * REMEMBERED:
            for name in [name for name in self._clients if name not in self._waiting][:-REMEMBERED]:
                del self._clients[name]

    def __bool__(self) -> bool:
        return bool(self._waiting)
