"""`genssl train-generator`"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import IO, Annotated

import typer

from genssl.cli.options import overrides_argument, recipe_argument


def train_generator(
    recipe: Annotated[Path, recipe_argument("The recipe of a generator", "generators/digits_flow")],
    overrides: Annotated[list[str] | None, overrides_argument("flow.steps=8000")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model; by default generators/NAME.", show_default=False)
    ] = None,
) -> None:
    """Train a generator on one's own images, without labels; the recipe's `family` says of which kind.

    After an interruption, the same command goes on where it was. Ctrl-C saves first; a second one does not wait. The
    weights are written before they are measured, which quality=none leaves out and quality=full does at length.

    \b
    genssl train-generator generators/folder_flow dataset.root=photos \\
        --out my-flow
    genssl train-generator generators/digits_flow --out my-flow
    genssl run simclr_flow generator.model=my-flow
    torchrun --nproc-per-node 4 -m genssl train-generator \\
        generators/folder_flow dataset.root=photos precision=bf16
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:  # torchrun started several of this
        from genssl.base.ranks import joined

        again = "start the same command again, and it goes on where it was saved last"
        with joined(again) as all_ranks, Path(os.devnull).open("w") as nowhere:  # the first rank speaks for all
            _train(recipe, overrides or [], out, ranks, file=sys.stdout if all_ranks.first else nowhere)
        return
    _train(recipe, overrides or [], out, ranks, file=sys.stdout)


def _train(recipe: Path, overrides: list[str], out: Path | None, ranks: int, *, file: IO[str]) -> None:
    from genssl.config.generator_recipes.base import GeneratorRecipe
    from genssl.config.load import load

    loaded = load(GeneratorRecipe, recipe, overrides)
    folder = out or Path("generators") / loaded.name

    from rich.console import Console

    from genssl.cli.tables import quality_table
    from genssl.generator_training.run import AGAIN
    from genssl.generator_training.run import train_generator as train

    console = Console(highlight=False, markup=False, file=file)  # overrides have brackets
    again = f"genssl train-generator {shlex.join([str(recipe), *overrides, '--out', str(folder)])}"
    quality = train(loaded, folder, console, again if ranks == 1 else AGAIN)
    if not quality:
        return
    console.print(quality_table(quality))
    if "teacher" in quality:
        console.print(quality_table(quality["teacher"], of="its teacher, "))
