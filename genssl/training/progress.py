"""What a person sees while a run goes on: live lines on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from genssl.config.recipe import Recipe
from genssl.variants.ledger import Ledger

LINE_SECONDS = 60.0  # between lines of one epoch where there is no terminal


class TimeLeft(TimeRemainingColumn):
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
            TimeLeft(),
            console=console,
            transient=transient,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bars, and the facts if there are any."""
        yield self.make_tasks_table(self.tasks)
        if self.facts:
            yield Text(f"  {self.facts}", no_wrap=True, overflow="ellipsis")


class RunProgress:
    """Shows what a run is, epoch, loss, images/s, the fresh fraction, what replaced the rest, and the stall share.

    Args:
        console: where it is written; without a terminal there is a line an epoch, and one a minute in longer epochs.
        transient: the live lines go away at the end.
        clock: seconds that never go back.
    """

    def __init__(
        self, console: Console, *, transient: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._clock = console, clock
        self._bar = TwoLines(console, transient=transient)
        self._task = self._bar.add_task("preparing", total=None)
        self._steps_per_epoch = self._epochs = self._evaluators = 1
        self._steps, self._total = 0, 0
        self._said = self._began = clock()
        self._first = 0  # step of this process

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Prints a line."""
        self._line(text)

    def _line(self, text: str) -> None:
        # Not wrapped: a command in it is there to be copied. No markup: there are brackets in addresses and paths.
        self._bar.console.print(text, soft_wrap=True, markup=False)

    def announce(self, recipe: Recipe, images: int, steps_per_epoch: int, device: str, out: Path) -> None:
        """Says what begins: device, directory, images, steps.

        Args:
            recipe: of the run.
            images: of the train split.
            steps_per_epoch: of all ranks together.
            device: in words.
            out: the run directory.
        """
        train = recipe.train
        left_out = images - steps_per_epoch * train.batch_size
        sit_out = f", of which {left_out:,} sit out each epoch" if left_out else ""
        epochs = f"{train.epochs:,} epoch{'s' * (train.epochs > 1)} of {steps_per_epoch:,}"
        steps = f"{train.epochs * steps_per_epoch:,} steps: {epochs}"
        self._line(f"{recipe.name} on {device}, into {out}")
        self._line(f"{images:,} images{sit_out}; {steps}, {train.batch_size:,} images each")

    def start(self, recipe: Recipe, steps_per_epoch: int, done: int = 0) -> None:
        """Says how long the training will be, and how many of its steps were done before."""
        self._steps = self._first = done
        self._steps_per_epoch, self._epochs = steps_per_epoch, recipe.train.epochs
        self._total, self._evaluators = steps_per_epoch * recipe.train.epochs, len(recipe.evaluate)
        self._said = self._began = self._clock()
        self._bar.reset(self._task, total=self._total, completed=done, description="training")

    def step(self, epoch: int, loss: float, *, images: int, seconds: float, ledger: Ledger) -> None:
        """Counts one step."""
        self._steps += 1
        facts = f"loss {loss:.3f}  {images / seconds:,.0f} images/s"
        if ledger.origins:
            facts += f"  fresh {ledger.fresh_fraction:.0%}"
            if reused := ledger.origins["reused"]:
                facts += f"  reused {reused / ledger.wanted:.0%}"
            if real := ledger.origins["real"]:
                facts += f"  real {real / ledger.wanted:.0%}"
            facts += f"  stall {ledger.stall_seconds / seconds:.0%}"
        title = f"epoch {epoch + 1}/{self._epochs}"
        self._bar.facts = facts
        self._bar.update(self._task, completed=self._steps, description=title)
        if self._console.is_terminal:
            return
        within = self._steps % self._steps_per_epoch
        now = self._clock()
        if within == 0 or now - self._said >= LINE_SECONDS:
            self._said = now
            left = (self._total - self._steps) * (now - self._began) / (self._steps - self._first)
            part = f" step {within}/{self._steps_per_epoch}" if within else ""
            self._line(f"{title}{part}  {facts}" + (f"  {duration(left)} left" if self._steps < self._total else ""))

    def evaluating(self, name: str) -> None:
        """Says which evaluator runs, with a bar of its own below that of the training."""
        task = self._bar.tasks[-1].id
        if task == self._task:
            self._bar.update(self._task, description="trained")
            self._bar.stop_task(self._task)
            task = self._bar.add_task("", total=self._evaluators, completed=-1, uneven=True)
        self._bar.facts = name
        self._bar.update(task, description="evaluating", advance=1)
        if not self._console.is_terminal:
            self._line(f"evaluating {name}")

    def evaluated(self) -> None:
        """Says that no evaluator is left."""
        self._bar.facts = ""
        task = self._bar.tasks[-1].id
        if task != self._task:
            self._bar.update(task, description="evaluated", completed=self._evaluators)
            self._bar.stop_task(task)


def duration(seconds: float) -> str:
    """Returns "3 s", "4 min 10 s" or "61 h 40 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
