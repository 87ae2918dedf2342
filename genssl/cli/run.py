"""`genssl run`"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from genssl.cli.options import Overrides, RecipeArgument


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/NAME-DATE-TIME.", show_default=False)
    ] = None,
) -> None:
    """Train and evaluate: one run from a recipe to a run directory.

    \b
    genssl run recipes/simclr_sd.yaml
    genssl run recipes/simclr_sd.yaml variants.source=none seed=1 --out runs/baseline-1
    """
    from genssl.config.load import load
    from genssl.config.recipe import Recipe

    loaded = load(Recipe, recipe, overrides or [])
    directory = out or Path("runs") / f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"

    from rich.console import Console

    from genssl.cli.tables import results_table
    from genssl.training.progress import Progress
    from genssl.training.run import run as train

    console = Console(highlight=False)
    for warning in loaded.warnings():
        console.print(f"warning: {warning}", style="yellow")
    with Progress(console) as progress:
        results = train(loaded, directory, progress)
    console.print(results_table(results))
    console.print(f"{directory}/report.html has the whole of it")
