"""`genssl preview`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from genssl.cli.options import Overrides, RecipeArgument


def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="Values of a parameter of the generator, drawn beside each other, such as noise_level=0,200,400; "
            "also ranges, as 2..8, and adaptive. Repeatable: all combinations.",
            show_default=False,
        ),
    ] = None,
    sources: Annotated[int, typer.Option(min=1, max=32, help="Rows: how many sources are drawn.")] = 8,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("preview.png"),
) -> None:
    """Draw sources beside their standard views and their variants, without training.

    \b
    genssl preview simclr_sd
    genssl preview simclr_sd --vary guidance_scale=1,4 --vary noise_level=0,400
    """
    from genssl.config.load import load
    from genssl.config.recipe import Recipe

    loaded = load(Recipe, recipe, overrides or [])

    from genssl.training.preview import preview as draw

    draw(loaded, out, vary or [], sources, lambda text: print(text, file=sys.stderr))
    print(f"{out}: written")
