"""Tells the kinds of documents apart, and says which command takes one that was given to another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from genssl.config.document import Document, read_document
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.protocol import Protocol
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile
from genssl.config.study import Study
from genssl.errors import ConfigError


@dataclass(frozen=True)
class DocumentKind:
    """One kind of file.

    Attributes:
        model: validates it.
        mark: a key that only this kind has; a recipe of a run has none of the marks.
        also: keys that tell it where the mark is left out, if nothing of a recipe of a run is there.
        called: what people call it.
        command: what takes it; the file's path follows.
    """

    model: type[BaseModel]
    mark: str
    also: frozenset[str]
    called: str
    command: str


RECIPE = DocumentKind(Recipe, "method", frozenset(), "a recipe of a training run", "genssl run")
OTHERS = (
    DocumentKind(ServerFile, "generators", frozenset({"limits", "address"}), "a server file", "genssl serve-generator"),
    DocumentKind(Study, "arms", frozenset({"recipe", "seeds", "reference"}), "a study", "genssl compare"),
    DocumentKind(
        GeneratorRecipe,
        "family",
        frozenset({"denoiser", "image_encoder", "autoencoder", "flow", "adversarial"}),
        "a recipe of a generator",
        "genssl train-generator",
    ),
    DocumentKind(Protocol, "datasets", frozenset(), "an evaluation protocol", "genssl evaluate RUN --protocol"),
)
OF_A_RUN = frozenset({"method", "backbone", "optimizer", "train", "views", "variants"})


def model_of(document: Document) -> type[BaseModel]:
    """Returns the model of a document; some keys mark what is no recipe of a run."""
    return _kind_of(document).model


def require_kind(document: Document, model: type[BaseModel]) -> None:
    """Raises ConfigError, naming the command that takes it, if a document is of another kind than `model` validates."""
    wanted = next((kind for kind in (RECIPE, *OTHERS) if issubclass(model, kind.model)), None)
    found = _kind_of(document)
    if wanted is None or found is wanted or (found is RECIPE and not OF_A_RUN & document.data.keys()):
        return  # what is of no kind for certain is told by its keys
    raise ConfigError([_other(document.name, found, wanted.called)])


def require_no_document(path: Path, expected: str) -> None:
    """Raises ConfigError, naming the command that takes it, if a path is one of these files, and not what is expected.

    Args:
        path: as it was given on the command line.
        expected: what the command takes.
    """
    if path.suffix in (".yaml", ".yml") and path.is_file():
        raise ConfigError([_other(str(path), _kind_of(read_document(path)), expected)])


def _other(name: str, found: DocumentKind, expected: str) -> str:
    command = f"{found.command} {name}"
    return f"{name}: is {found.called}, and {expected} is expected here; the command for it is: {command}"


def _kind_of(document: Document) -> DocumentKind:
    keys = document.data.keys()
    for kind in OTHERS:
        if kind.mark in keys:
            return kind
    if not OF_A_RUN & keys:
        for kind in OTHERS:
            if kind.also & keys:
                return kind
    return RECIPE
