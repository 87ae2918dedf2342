"""Tells the kinds of documents apart."""

from __future__ import annotations

from pydantic import BaseModel

from genssl.config.document import Document
from genssl.config.evaluation import Protocol
from genssl.config.generator_recipe import GeneratorRecipe
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile
from genssl.config.study import Study


def model_of(document: Document) -> type[BaseModel]:
    """Returns the model of a document; some keys mark what is no recipe of a run."""
    if "generators" in document.data:
        return ServerFile
    if "arms" in document.data:
        return Study
    if "family" in document.data:
        return GeneratorRecipe
    if "datasets" in document.data:
        return Protocol
    return Recipe
