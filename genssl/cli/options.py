"""Arguments that several subcommands share, each with an example of the command that takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def complete_recipe(incomplete: str) -> list[str]:
    """Returns what the shell offers for a recipe: shipped names, and files."""
    from genssl.config.documents.shipped import completions
    from genssl.errors import UserError

    try:
        return completions(incomplete)
    except (
        UserError,
        OSError,
        ValueError,
        NotImplementedError,
    ):  # no recipes are here; an absolute path, or no pattern
        return []


def recipe_argument(what: str, example: str, metavar: str = "RECIPE") -> Any:
    """Returns the argument that names a YAML file or a shipped one.

    Args:
        what: such as "A study".
        example: the name of one.
        metavar: of the usage line.
    """
    return typer.Argument(
        metavar=metavar,
        help=f"{what}: a file, or the name of one that came with genssl, such as {example} (genssl recipes lists "
        "them).",
        show_default=False,
        autocompletion=complete_recipe,
    )


def overrides_argument(example: str) -> Any:
    """Returns the argument of `key.path=value` settings; `example` is one of them."""
    return typer.Argument(
        metavar="KEY.PATH=VALUE",
        help=f"Settings that replace those of the file, such as {example}.",
        show_default=False,
    )


RecipeArgument = Annotated[Path, recipe_argument("A recipe", "simclr_sd")]
Overrides = Annotated[list[str] | None, overrides_argument("train.epochs=5")]
