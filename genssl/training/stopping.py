"""SIGTERM and Ctrl-C during the training: the step that is under way is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Raised where a step waits and nothing of it has happened yet."""


class StopSignals:
    """Notes the `number` of a signal inside its `with` block; a second signal is followed at once.

    Elsewhere than in the main thread signals cannot be caught, and this does nothing.

    Args:
        breaks: whether a signal ends a wait; not among several ranks, which must end with the same step.
    """

    def __init__(self, *, breaks: bool = True) -> None:
        self.number: int | None = None
        self._breaks = breaks
        self._handlers: dict[int, Any] = {}  # to be put back
        self._before: dict[int, Any] = {}  # that were put back
        self._waiting = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Leaves signals to those who had them before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._before |= self._handlers
        self._handlers = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a signal ends the wait by raising Stopped: a slow generator may need longer than there is time."""
        self._waiting = self._breaks
        try:
            if self._waiting and self.number is not None:
                raise Stopped
            yield
        finally:
            self._waiting = False

    def follow(self) -> None:
        """Restores the former handlers and re-raises the caught signal through them.

        Where another rank got the signal, it is SIGTERM.
        """
        self.restore()
        number = self.number or signal.SIGTERM
        handler: Callable[[int, FrameType | None], Any] | int | None = self._before.get(number)
        if callable(handler):
            handler(number, None)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            self.follow()
        self.number = number
        if self._waiting:
            raise Stopped
