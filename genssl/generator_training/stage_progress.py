"""What a person sees while a generator is trained and measured: stage, loss, images a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

LINES = 5  # a stage, where there is no terminal
EVERY_SECONDS = 60.0  # there is a line there, too


class StageProgress:
    """A bar a stage on a terminal; elsewhere five lines a stage, and one a minute.

    Rates and the time left are of what this process has done of a stage, not of what was done before an interruption.

    Args:
        console: where it is written.
        clock: seconds, in place of the monotonic clock.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._stage = ""
        self._begun, self._first, self._told, self._done = 0.0, 0, 0.0, 0
        self._bar: Progress | None = None

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, stage: str, step: int, steps: int, loss: float, images: int) -> None:
        """Shows that a step of a stage of the training is done, of so many images."""
        rate = self._enter(stage, step, steps, MofNCompleteColumn())
        facts = [f"loss {loss:.4f}"]
        if rate is not None:
            facts += [f"{rate * images:,.0f} images/s", f"{spoken((steps - step) / rate)} left"]
        self._show(f"{stage}: step {step}/{steps}", step, steps, facts)

    def measuring(self, what: str, done: int, total: int) -> None:
        """Shows how much of the measuring is done."""
        rate = self._enter("measuring", done, total, TaskProgressColumn())
        self._show(what, done, total, [] if rate is None else [f"{spoken((total - done) / rate)} left"])

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, soft_wrap=True)

    def _enter(self, stage: str, done: int, total: int, count: MofNCompleteColumn | TaskProgressColumn) -> float | None:
        """Begins with a stage if it is new; returns how much of it a second is done, None at its beginning."""
        now = self._clock()
        if stage != self._stage:
            self.__exit__()
            self._stage, self._begun, self._first, self._told, self._done = stage, now, done, now, done - 1
            if self._console.is_terminal:
                begin, facts = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[facts]}")
                bar = BarColumn(bar_width=24)
                self._bar = Progress(begin, bar, count, facts, TimeElapsedColumn(), console=self._console)
                self._bar.add_task(stage, total=total, completed=done, facts="")
                self._bar.start()
        return (done - self._first) / (now - self._begun) if done > self._first and now > self._begun else None

    def _show(self, title: str, done: int, total: int, facts: list[str]) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, facts="  ".join(facts))
            return
        now = self._clock()
        if done * LINES // total > self._done * LINES // total or now - self._told >= EVERY_SECONDS:
            self._told = now
            self._console.print(", ".join([title, *facts]), soft_wrap=True)
        self._done = done


def spoken(seconds: float) -> str:
    """Returns a duration as people say it: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
