"""`genssl runs`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from genssl.training.run_directory import UnfinishedRun


def runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of run directories.")] = Path("runs"),
) -> None:
    """Tabulate runs; finished ones that differ in nothing but the seed share a row, mean ± 95 % t-interval.

    Of several runs of one recipe and seed the one that finished last counts; the others are named below.

    Runs that are under way or were interrupted follow, with how to go on.

    \b
    genssl runs
    genssl runs runs/ablation
    """
    from rich.console import Console

    from genssl.cli.tables import repeats, runs_table
    from genssl.studies.runs import summarise_runs
    from genssl.training.run_directory import unfinished_runs

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no edge to wrap at
        console.width = 1000
    unfinished = unfinished_runs(folder)
    if not unfinished or any(folder.glob("*/results.json")):
        groups = summarise_runs(folder)
        console.print(runs_table(groups))
        for line in repeats(groups):
            console.print(line, soft_wrap=True)
    if unfinished:
        console.print(_table(unfinished))


def _table(unfinished: list[UnfinishedRun]) -> Table:
    from rich.table import Table

    table = Table(title="not finished", title_justify="left")
    for name in ("recipe", "seed", "epochs", "state"):
        table.add_column(name, justify="right" if name == "epochs" else "left")
    for run in unfinished:
        table.add_row(run.name, str(run.seed), f"{run.epochs_done} of {run.epochs}", run.state)
    return table
