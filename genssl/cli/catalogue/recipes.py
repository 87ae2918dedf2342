"""`genssl recipes`"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(invoke_without_command=True)


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes that came with this version of genssl, or copy one.

    \b
    genssl recipes
    genssl recipes copy imagenet/simclr
    """
    if context.invoked_subcommand is not None:
        return
    from genssl.config.documents.shipped import headline, shipped_recipes

    shipped = shipped_recipes()
    longest = max(len(name) for name in shipped)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, path in shipped.items():
        line = f"{name:<{longest}}  {headline(path)}"
        print(line if width is None or len(line) <= width else f"{line[: width - 1]}…")
    print("\nCopy one with: genssl recipes copy NAME [DEST]")


@app.command("copy")
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `genssl recipes` prints it.", show_default=False)],
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DEST", help="A file or a folder; by default this folder.", show_default=False),
    ] = None,
) -> None:
    """Copy a recipe of this version of genssl, header and all.

    \b
    genssl recipes copy imagenet/simclr
    genssl recipes copy studies/methods my-study.yaml
    """
    from genssl.config.documents.copy import copy_recipe

    for path in copy_recipe(name, destination or Path()):
        print(f"{path}: written")
