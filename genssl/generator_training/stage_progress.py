"""What a person sees while a generator is trained and measured: stage, loss, images a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from genssl.training.progress import TwoLines, duration

LINES = 5  # a stage, where there is no terminal
EVERY_SECONDS = 60.0  # there is a line there, too


class StageProgress:
    """A bar a stage on a terminal; elsewhere five lines a stage, and one a minute.

    Rates and the time left are of what this process has done of a stage, not of what was done before an interruption.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._stage = ""
        self._begun, self._first, self._told, self._done = 0.0, 0.0, 0.0, 0.0
        self._bar: TwoLines | None = None

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, stage: str, step: int, steps: int, loss: float, images: int) -> None:
        """Shows that a step of a stage of the training is done, of so many images."""
        rate = self._enter(stage, step, steps)
        facts = [f"loss {loss:.4f}"]
        if rate is not None:
            facts += [f"{rate * images:,.0f} images/s", f"{duration((steps - step) / rate)} left"]
        self._show(f"{stage}: step {step}/{steps}", step, steps, facts)

    def measuring(self, what: str, done: int, total: int) -> None:
        """Shows how much of the measuring is done."""
        percent = 100 * done / total  # the work itself is counted in millions
        rate = self._enter("measuring", percent, 100)
        self._show(what, percent, 100, [] if rate is None else [f"{duration((100 - percent) / rate)} left"])

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, soft_wrap=True)

    def _enter(self, stage: str, done: float, total: int) -> float | None:
        """Begins with a stage if it is new; returns how much of it a second is done, None at its beginning."""
        now = self._clock()
        if stage != self._stage:
            self.__exit__()
            self._stage, self._begun, self._first, self._told, self._done = stage, now, done, now, done - 1
            if self._console.is_terminal:
                self._bar = TwoLines(self._console)
                self._bar.add_task(stage, total=total, completed=int(done))
                self._bar.start()
        return (done - self._first) / (now - self._begun) if done > self._first and now > self._begun else None

    def _show(self, title: str, done: float, total: int, facts: list[str]) -> None:
        if self._bar is not None:
            self._bar.facts = "  ".join(facts)
            self._bar.update(self._bar.task_ids[0], completed=done)
            return
        now = self._clock()
        if done * LINES // total > self._done * LINES // total or now - self._told >= EVERY_SECONDS:
            self._told = now
            self._console.print(", ".join([title, *facts]), soft_wrap=True)
        self._done = done
