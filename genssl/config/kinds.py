"""Tells the kinds of documents apart."""

from __future__ import annotations

from pydantic import BaseModel

from genssl.config.document import Document
from genssl.config.generator_recipe import GeneratorRecipe
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile


def model_of(document: Document) -> type[BaseModel]:
    """Returns the model of a document; the key `generators` marks a server file, and `family` a generator recipe."""
    if "generators" in document.data:
        return ServerFile
    if "family" in document.data:
        return GeneratorRecipe
    return Recipe
