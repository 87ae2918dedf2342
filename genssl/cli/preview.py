"""`genssl preview`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genssl.cli.options import Overrides, RecipeArgument


def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("preview.png"),
) -> None:
    """Draw sources beside their standard views and their variants, without training."""
    from genssl.config.load import load
    from genssl.config.recipe import Recipe

    loaded = load(Recipe, recipe, overrides or [])

    from genssl.training.preview import preview as draw

    draw(loaded, out)
    print(f"{out}: written")
