"""What a caller does that can go on without a server: it stops asking one that is away, and says so now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
REMIND_SECONDS = 60.0

Clock = Callable[[], float]


class CircuitBreaker:
    """Decides whether a source of variants is asked at all, for callers that can do without.

    Closed at first: everything is asked. A failure opens it, and nothing is asked any more until `reachable` says,
    without waiting, that the server has been reached again. Then one call is let through (half open): its success
    closes the breaker, its failure opens it again, from now on for a pause besides, 1 s and each time twice as long up
    to 60 s: a server may well be there and yet too slow for every deadline.
    """

    def __init__(self, reachable: Callable[[], bool], clock: Clock = time.monotonic) -> None:
        self._reachable, self._clock = reachable, clock
        self._failures, self._not_before = 0, 0.0

    @property
    def open(self) -> bool:
        """Says whether the last call that was let through has failed."""
        return self._failures > 0

    def allows(self) -> bool:
        """Says whether to ask now; whoever hears True when it is open makes the one call that tries."""
        if not self.open:
            return True
        if self._clock() < self._not_before or not self._reachable():
            return False
        self._not_before = self._clock() + max(FIRST_PAUSE, self._pause())  # for others, while this one tries
        return True

    def failed(self) -> None:
        """Opens it: a call that was let through has brought nothing."""
        self._failures += 1
        self._not_before = self._clock() + self._pause()

    def succeeded(self) -> None:
        """Closes it."""
        self._failures = 0

    def _pause(self) -> float:
        return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self._failures - 2, 10)) if self._failures > 1 else 0.0


class Reminder:
    """Says when something that lasts is to be logged: once it has lasted for `after` seconds, and then every minute."""

    def __init__(self, after: float = 0.0, clock: Clock = time.monotonic) -> None:
        self._after, self._clock = after, clock
        self._due: float | None = None
        self._logged = False

    def lasts(self) -> bool:
        """Notes that it lasts; says whether to log that now."""
        now = self._clock()
        if self._due is None:
            self._due = now + self._after
        if now < self._due:
            return False
        self._due, self._logged = now + REMIND_SECONDS, True
        return True

    def ended(self) -> bool:
        """Notes that it is over; says whether to log that, because its lasting was."""
        logged, self._due, self._logged = self._logged, None, False
        return logged


class FallbackLog:
    """Logs that views do without their variants: at the first of them, every minute, and when variants come again."""

    def __init__(self, log: logging.Logger, clock: Clock = time.monotonic) -> None:
        self._log, self._reminder = log, Reminder(clock=clock)
        self._views = 0

    def fell_back(self, views: int, why: object) -> None:
        """Notes so many more views without their variants."""
        self._views += views
        if self._reminder.lasts():
            self._log.warning("%d views so far do without their variants (they are counted): %s", self._views, why)

    def came(self) -> None:
        """Notes that variants have come."""
        if self._reminder.ended():
            self._log.warning("variants come again; %d views went without", self._views)
        self._views = 0
