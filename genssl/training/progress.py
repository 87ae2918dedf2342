"""What a person sees while a run goes on: a live line on a terminal, one line an epoch elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from genssl.config.recipe import Recipe
from genssl.variants.ledger import Ledger


class Progress:
    """Shows epoch, loss, images/s, the fresh fraction, what replaced the rest, and the stall share.

    Args:
        console: where it is written; without a terminal there is one line an epoch.
        transient: the live line goes away at the end.
    """

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
        )
        self._task = self._bar.add_task("starting", total=None, facts="")
        self._steps_per_epoch = 1
        self._epochs = 0
        self._steps = 0

    def __enter__(self) -> Progress:
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
        self._bar.console.print(text, soft_wrap=True)  # a command in it is there to be copied

    def start(self, recipe: Recipe, steps_per_epoch: int, done: int = 0) -> None:
        """Says how long the training will be, and how many of its steps were done before."""
        self._steps = done
        self._steps_per_epoch, self._epochs = steps_per_epoch, recipe.train.epochs
        self._bar.reset(self._task, total=steps_per_epoch * recipe.train.epochs, completed=done)

    def step(self, epoch: int, loss: float, *, images: int, seconds: float, ledger: Ledger) -> None:
        """Counts one step."""
        self._steps += 1
        facts = f"loss {loss:.3f}  {images / seconds:,.0f} images/s"
        if ledger.origins:
            facts += f"  fresh {ledger.fresh_fraction:.0%}"
            if reused := ledger.origins["reused"]:
                facts += f"  reused {reused / ledger.wanted:.0%}"
            if real := ledger.origins["real"]:
                facts += f"  real instead {real / ledger.wanted:.0%}"
            facts += f"  stall {ledger.stall_seconds / seconds:.0%}"
        title = f"epoch {epoch + 1}/{self._epochs}"
        self._bar.update(self._task, completed=self._steps, description=title, facts=facts)
        if not self._console.is_terminal and self._steps % self._steps_per_epoch == 0:
            self._console.print(f"{title}  {facts}")

    def evaluating(self, name: str) -> None:
        """Says which evaluator runs."""
        self._bar.update(self._task, description=f"evaluating {name}", facts="")
