"""`genssl validate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genssl.cli.options import complete_recipe


def validate(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|KEY.PATH=VALUE",
            help="Files, or names of recipes that came with genssl, and settings for all of them.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ],
) -> None:
    """Check recipes without running them; loads neither torch nor any data.

    Recipes of training runs, of generators (recipes/generators), studies and server files are told apart by their keys.
    Of a study, the recipe of every arm is checked. Warnings, which do not make a file invalid, go to standard error.

    \b
    genssl validate my.yaml train.epochs=5
    genssl validate recipes/*.yaml servers/*.yaml
    """
    import sys

    from genssl.config.documents.document import apply_override, read_document
    from genssl.config.load import load_study, model_of
    from genssl.config.study import Study
    from genssl.config.validate import validate as check
    from genssl.errors import ConfigError

    paths = [Path(item) for item in recipes if "=" not in item]
    overrides = [item for item in recipes if "=" in item]
    problems: list[str] = []
    if not paths:
        problems.append("validate: no recipe was given, only overrides")
    for path in paths:
        try:
            document = read_document(path)
            checked: object
            if (model := model_of(document)) is Study:  # overrides are of its recipes
                checked = load_study(path, overrides)
            else:
                for override in overrides:
                    apply_override(document, override)
                checked = check(model, document)
            print(f"{path}: valid")
            for warning in getattr(checked, "warnings", list)():
                print(f"{path}: warning: {warning}", file=sys.stderr)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
