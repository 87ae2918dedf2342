"""What a person sees while something long goes on: live lines on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.text import Text

from genssl.config.recipe import Recipe
from genssl.variants.ledger import Ledger

LINE_SECONDS = 60.0  # between lines where there is no terminal


class TimeLeftColumn(RemainingColumn):
    """The time left, where the parts of a task take about as long as each other."""

    def render(self, task: Task) -> Text:
        """Returns "left 0:01:02", or nothing."""
        if task.total is None or task.fields.get("uneven"):
            return Text()
        return Text("left ").append_text(super().render(task))


class TwoLines(Progress):
    """A bar with times, and below it a line of facts; both fit into 80 columns."""

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        self.facts = ""
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeLeftColumn(),
            console=console,
            transient=transient,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bars, and the facts if there are any."""
        yield self.make_tasks_table(self.tasks)
        if self.facts:
            yield Text(f"  {self.facts}", no_wrap=True, overflow="ellipsis")


class Display:
    """Bars, one after the other, and a line of facts below them; where there is no terminal, a line now and then.

    Args:
        console: where it is written.
        transient: the live lines go away at the end.
        every: seconds between lines where there is no terminal.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        console: Console,
        *,
        transient: bool = False,
        every: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_live = console.is_terminal
        self._bar, self._every, self._clock = TwoLines(console, transient=transient), every, clock
        self.done, self.total = 0, 0  # of the newest bar
        self._first, self._began, self._told = 0, clock(), clock()

    def __enter__(self) -> Self:
        if self.is_live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Prints a line above the bars."""
        # Not wrapped: a command in it is there to be copied. No markup: there are brackets in addresses and paths.
        self._bar.console.print(text, soft_wrap=True, markup=False)

    def begin(self, title: str, total: int | None = None, done: int = 0, *, uneven: bool = False) -> None:
        """Begins with a new bar; if the newest one has no length yet, that one gets it.

        Args:
            title: left of the bar.
            total: its length, if that is known.
            done: that were done before; they count neither for the rate nor for the time left.
            uneven: one part does not tell how long another takes, so no time left is shown.
        """
        if self._bar.tasks and self._bar.tasks[-1].total is None:
            self._bar.reset(self._bar.tasks[-1].id, total=total, completed=done, description=title)
        else:
            if self._bar.tasks:
                self._bar.stop_task(self._bar.tasks[-1].id)
            self._bar.add_task(title, total=total, completed=done, uneven=uneven)
        self.done = self._first = done
        self.total, self._began, self._told = total or 0, self._clock(), self._clock()

    def show(self, title: str, facts: str, done: int) -> None:
        """Says how much of the newest bar is done, and what there is to know."""
        self.done, self._bar.facts = done, facts
        self._bar.update(self._bar.tasks[-1].id, completed=done, description=title)

    def is_line_due(self, *, anyway: bool = False) -> bool:
        """Says whether to print a line, where there is no terminal: `every` seconds after the last one, or `anyway`."""
        if self.is_live or (self._clock() - self._told < self._every and not anyway):
            return False
        self._told = self._clock()
        return True

    def left(self) -> str:
        """Returns "2 min 0 s left" by what this process has done of the newest bar; nothing if that is all or none."""
        if not self._first < self.done < self.total:
            return ""
        return f"{duration((self.total - self.done) * (self._clock() - self._began) / (self.done - self._first))} left"


class RunProgress(Display):
    """Shows what a run is, epoch, loss, images/s, the fresh fraction, what replaced the rest, and the stall share.

    Without a terminal there is a line an epoch, and one a minute in longer epochs.
    """

    def __init__(
        self, console: Console, *, transient: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, transient=transient, clock=clock)
        self._steps_per_epoch = self._epochs = self._evaluators = 1
        self._is_evaluating = False
        self.begin("preparing")

    def announce(self, recipe: Recipe, images: int, steps_per_epoch: int, device: str, out: Path) -> None:
        """Says what begins: device in words, directory, images of the train split, steps of all ranks together."""
        train = recipe.train
        left_out = images - steps_per_epoch * train.batch_size
        sit_out = f", of which {left_out:,} sit out each epoch" if left_out else ""
        epochs = f"{train.epochs:,} epoch{'s' * (train.epochs > 1)} of {steps_per_epoch:,}"
        steps = f"{train.epochs * steps_per_epoch:,} steps: {epochs}"
        self.note(f"{recipe.name} on {device}, into {out}")
        self.note(f"{images:,} images{sit_out}; {steps}, {train.batch_size:,} images each")

    def start(self, recipe: Recipe, steps_per_epoch: int, done: int = 0) -> None:
        """Says how long the training will be, and how many of its steps were done before."""
        self._steps_per_epoch, self._epochs = steps_per_epoch, recipe.train.epochs
        self._evaluators = len(recipe.evaluate)
        self.begin("training", steps_per_epoch * recipe.train.epochs, done)

    def step(self, epoch: int, loss: float, *, images: int, seconds: float, ledger: Ledger) -> None:
        """Counts one step."""
        facts = [f"loss {loss:.3f}", f"{images / seconds:,.0f} images/s"]
        if ledger.origins:
            facts.append(f"fresh {ledger.fresh_fraction:.0%}")
            for origin in ("reused", "real"):
                if count := ledger.origins[origin]:
                    facts.append(f"{origin} {count / ledger.wanted:.0%}")
            facts.append(f"stall {ledger.stall_seconds / seconds:.0%}")
        title = f"epoch {epoch + 1}/{self._epochs}"
        self.show(title, "  ".join(facts), self.done + 1)
        within = self.done % self._steps_per_epoch
        if self.is_line_due(anyway=within == 0):
            part = f" step {within}/{self._steps_per_epoch}" if within else ""
            self.note("  ".join([title + part, *facts, *filter(None, [self.left()])]))

    def evaluating(self, name: str) -> None:
        """Says which evaluator runs, with a bar of its own below that of the training."""
        if self._is_evaluating:
            self.done += 1
        else:
            self._is_evaluating = True
            self.show("trained", "", self.done)
            self.begin("evaluating", self._evaluators, uneven=True)
        self.show("evaluating", name, self.done)
        if not self.is_live:
            self.note(f"evaluating {name}")

    def evaluated(self) -> None:
        """Says that no evaluator is left."""
        self._bar.facts = ""
        if self._is_evaluating:
            self.show("evaluated", "", self._evaluators)
            self._bar.stop_task(self._bar.tasks[-1].id)


def duration(seconds: float) -> str:
    """Returns "3 s", "4 min 10 s" or "61 h 40 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
