"""`genssl show`"""

from __future__ import annotations

from genssl.cli.options import Overrides, RecipeArgument


def show(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print a recipe or server file with every default filled in and every override applied, as YAML."""
    from genssl.config.document import apply_override, read_document
    from genssl.config.dump import to_yaml
    from genssl.config.kinds import model_of
    from genssl.config.load import validate

    document = read_document(recipe)
    for override in overrides or []:
        apply_override(document, override)
    print(to_yaml(validate(model_of(document), document)), end="")
