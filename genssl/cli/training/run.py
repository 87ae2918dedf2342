"""`genssl run`"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from genssl.cli.folders import new_folder
from genssl.cli.options import Overrides, recipe_argument

if TYPE_CHECKING:
    from genssl.config.recipe import Recipe


def run(
    recipe: Annotated[Path | None, recipe_argument("A recipe", "simclr_sd")] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/NAME-DATE-TIME.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Go on with the run in this directory; with a recipe, begin it there if there is none yet. "
            "train.epochs=N gives it another length, where what is done does not depend on it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train and evaluate: one run from a recipe to a run directory.

    \b
    genssl run simclr_sd
    genssl run my.yaml variants.source=none seed=1 --out runs/baseline-1
    genssl run --resume runs/baseline-1                  # after an interruption
    genssl run --resume runs/baseline-1 train.epochs=40  # to make it longer
    torchrun --nproc-per-node 4 -m genssl run simclr_sd
    """
    settings = overrides or []
    if resume is not None and recipe is not None and "=" in recipe.name and not recipe.exists():
        recipe, settings = None, [str(recipe), *settings]  # typer takes the first setting for the recipe
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun started several of this
        from genssl.base.ranks import joined

        with joined() as ranks:
            loaded, given = _what_and_where(recipe, settings, out, resume)
            if ranks.first:
                with _directory(loaded, given) as directory:
                    ranks.tell("out", str(directory))
                    _run(loaded, directory, resume is not None, file=sys.stdout)
            else:  # the first rank speaks for all, and chooses a directory's name for all
                with Path(os.devnull).open("w") as nowhere:
                    _run(loaded, Path(ranks.hear("out")), resume is not None, file=nowhere)
        return
    loaded, given = _what_and_where(recipe, settings, out, resume)
    with _directory(loaded, given) as directory:
        _run(loaded, directory, resume is not None, file=sys.stdout)


def _directory(recipe: Recipe, given: Path | None) -> AbstractContextManager[Path]:
    return nullcontext(given) if given is not None else new_folder(Path("runs"), recipe.name)


def _run(recipe: Recipe, directory: Path, resume: bool, *, file: IO[str]) -> None:
    from rich.console import Console

    from genssl.cli.tables import results_table
    from genssl.training.progress import RunProgress
    from genssl.training.run import run as train

    console = Console(highlight=False, file=file)
    for warning in recipe.warnings():
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    with RunProgress(console) as progress:
        results = train(recipe, directory, progress, resume=resume)
    if results:
        console.print(results_table(results))
        console.print(f"{directory}/report.html has the whole of it", markup=False, soft_wrap=True)


def _what_and_where(
    recipe: Path | None, settings: list[str], out: Path | None, resume: Path | None
) -> tuple[Recipe, Path | None]:
    """Returns the recipe and the run directory that the command line means; None: a new one."""
    from genssl.config.load import load
    from genssl.config.recipe import Recipe
    from genssl.errors import UserError

    if resume is None:
        if recipe is None:
            raise typer.BadParameter("Missing argument 'RECIPE' (or --resume DIR, to go on with a run).")
        return load(Recipe, recipe, settings), out
    if out is not None and out != resume:
        raise UserError(f"--resume {resume} goes on in that directory; leave --out {out} out")
    if recipe is not None:
        return load(Recipe, recipe, settings), resume
    from genssl.training.run_directory import recipe_of

    return recipe_of(resume, settings), resume
