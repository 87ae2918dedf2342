"""`genssl preview`"""

from __future__ import annotations

from collections.abc import Sequence
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
            "repeatable: all combinations.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("preview.png"),
) -> None:
    """Draw sources beside their standard views and their variants, without training.

    \b
    genssl preview recipes/simclr_sd.yaml
    genssl preview recipes/simclr_sd.yaml --vary noise_level=0,300,600 --vary num_inference_steps=1,4
    """
    from genssl.config.load import load
    from genssl.config.recipe import Recipe

    loaded = load(Recipe, recipe, overrides or [])
    varied = varied_parameters(vary or [])

    from genssl.training.preview import preview as draw

    draw(loaded, out, varied)
    print(f"{out}: written")


def varied_parameters(texts: Sequence[str]) -> dict[str, list[float]]:
    """Reads "name=1,2,3" texts.

    Raises:
        UserError: if one is of another form, or two name one parameter.
    """
    from genssl.errors import UserError

    found: dict[str, list[float]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if not equals or not name.strip() or not numbers:
            raise UserError(f"--vary {text}: a parameter and its values are expected, such as noise_level=0,200,400")
        if name.strip() in found:
            raise UserError(f"--vary {text}: {name.strip()} is given twice; give all its values at once")
        found[name.strip()] = numbers
    return found
