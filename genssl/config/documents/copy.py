"""Copies a shipped recipe to where its user can change it."""

from __future__ import annotations

import os
from pathlib import Path

from genssl.config.documents.document import read_document
from genssl.config.documents.shipped import shipped_recipes
from genssl.errors import UserError, suggest


def copy_recipe(name: str, destination: Path) -> list[Path]:
    """Copies a recipe, and, for a study, the recipe that it is built on.

    Args:
        name: as `shipped_recipes` has it; ".yaml" may stand behind it.
        destination: a file that ends in .yaml, or a folder that exists.

    Returns:
        What was written.

    Raises:
        UserError: for an unknown name, a destination that exists, or one whose folder does not.
    """
    available = shipped_recipes()
    source = available.get(name.removesuffix(".yaml"))
    if source is None:
        raise UserError(f"recipes: there is no {name!r}{suggest(name, available)}")
    target = destination / source.name if destination.is_dir() else destination
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"{target}: is not a folder, and a recipe's name ends in .yaml; make the folder, or give such a name"
        )
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; make it first")
    contents = {target: source.read_bytes()}
    base = read_document(source).data.get("recipe") if "arms" in read_document(source).data else None
    if isinstance(base, str):  # a study's base recipe is named relative to the study's file
        contents[Path(os.path.normpath(target.parent / Path(base).name))] = (source.parent / base).read_bytes()
        contents[target] = contents[target].replace(f"recipe: {base}".encode(), f"recipe: {Path(base).name}".encode())
    for path, content in contents.items():
        if path.exists() and (path == target or path.read_bytes() != content):
            raise UserError(f"{path}: exists already; give another destination, or remove it")
    for path, content in contents.items():
        path.write_bytes(content)
    return list(contents)
