"""`genssl runs`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="A folder of run directories.")] = Path("runs"),
) -> None:
    """Tabulate finished runs: recipes that differ in nothing but the seed share a row, mean ± 95 % t-interval."""
    from rich.console import Console

    from genssl.cli.tables import runs_table
    from genssl.config.summary import summarise_runs

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no edge to wrap at
        console.width = 160
    console.print(runs_table(summarise_runs(folder)))
