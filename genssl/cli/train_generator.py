"""`genssl train-generator`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genssl.cli.options import Overrides, RecipeArgument


def train_generator(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model; by default generators/NAME.", show_default=False)
    ] = None,
) -> None:
    """Train a generator on one's own images, without labels; the recipe's `family` says of which kind.

    \b
    genssl train-generator recipes/generators/digits_flow.yaml --out my-flow
    genssl run recipes/simclr_flow.yaml generator.model=my-flow
    """
    from genssl.config.generator_recipe import GeneratorRecipe
    from genssl.config.load import load

    loaded = load(GeneratorRecipe, recipe, overrides or [])
    folder = out or Path("generators") / loaded.name

    from rich.console import Console

    from genssl.cli.tables import quality_table
    from genssl.training.generator import train_generator as train

    console = Console(highlight=False)
    quality = train(loaded, folder, console)
    console.print(quality_table(quality))
    console.print(f"{folder}: written; use it with generator.model={folder}")
