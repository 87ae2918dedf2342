"""From files and command lines to validated models: recipes, studies, server files, protocols, single blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, SerializeAsAny

from genssl.base.wording import counted
from genssl.config.base import ComponentConfig, Kind, Section
from genssl.config.documents.document import Document, apply_override, apply_setting, parse_document, read_document
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.protocol import Protocol
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile
from genssl.config.study import STORE_OF_STUDY, Arm, LoadedArm, LoadedStudy, Study
from genssl.config.validate import validate
from genssl.errors import ConfigError, suggest

M = TypeVar("M", bound=BaseModel)


def load(model: type[M], path: str | Path, overrides: Sequence[str] = ()) -> M:
    """Reads a YAML file, applies `key.path=value` overrides in order, and validates it.

    Raises:
        ConfigError: naming, for every problem, file:line (or the override), the key path, what was found and what is
            allowed; or, of a file of another kind, the command that takes it.
    """
    document = read_document(path)
    require_kind(document, model)
    for override in overrides:
        apply_override(document, override)
    return validate(model, document)


def load_study(
    path: Path, overrides: Sequence[str] = (), *, seeds: list[int] | None = None, quick: bool = False
) -> LoadedStudy:
    """Reads a study and the recipe of every arm.

    Args:
        path: of the study's YAML.
        overrides: `key.path=value` for the recipes of all arms; stronger than the study's `set`, weaker than an arm's.
        seeds: in place of the file's.
        quick: takes the short form.

    Raises:
        ConfigError: naming every problem with file:line, key path, what was found and what is allowed.
    """
    document = read_document(path)
    require_kind(document, Study)
    study = validate(Study, document)
    if quick and study.quick is None:
        raise ConfigError([f"{document.where(())}: quick: the study has no short form; leave --quick away, or add one"])
    base = read_document(Path(document.name).parent / study.recipe)
    require_kind(base, Recipe)
    settings = [(("set",), study.set)] + ([(("quick", "set"), study.quick.set)] if quick and study.quick else [])
    for place, values in settings:
        for key, value in values.items():
            apply_setting(base, key, value, document.where((*place, key)))
    for override in overrides:
        apply_override(base, override)
    problems: list[str] = []
    arms = []
    for number, arm in enumerate(study.arms):
        try:
            arms.append(LoadedArm(arm, _recipe_of(arm, number, base, document)))
        except ConfigError as error:
            problems += [f"arm {arm.name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    loaded = LoadedStudy(
        study,
        _with_store(_copy(base), document.where(("set",))),
        arms,
        seeds or (study.quick.seeds if quick and study.quick else study.seeds),
        quick,
    )
    problems = _disagreements(loaded, document)
    if problems:
        raise ConfigError(problems)
    return loaded


def _recipe_of(arm: Arm, number: int, base: Document, study: Document) -> Recipe:
    """Returns the recipe of an arm."""
    copied = _copy(base)
    for key, value in arm.set.items():
        apply_setting(copied, key, value, study.where(("arms", number, "set", key)))
    return _with_store(copied, study.where(("arms", number)), needed=arm.control_of is not None)


def _with_store(document: Document, where: str, *, needed: bool = False) -> Recipe:
    """Validates a recipe; one that reads a store, or is `needed` to, and does not name it gets the study's."""
    variants = document.data.get("variants")
    stored = isinstance(variants, dict) and variants.get("source") == "stored"
    if (stored or needed) and not (isinstance(variants, dict) and variants.get("store")):
        apply_setting(document, "variants.store", STORE_OF_STUDY, where)
    return validate(Recipe, document)


def _copy(document: Document) -> Document:
    return Document(document.name, copy.deepcopy(document.data), dict(document.places))


def _disagreements(loaded: LoadedStudy, document: Document) -> list[str]:
    """Returns what makes arms incomparable."""
    problems = []
    evaluators = {config.name for config in loaded.base.evaluate}
    evaluator = loaded.study.metric.split("/")[0]
    if evaluator not in evaluators:
        problems.append(
            f"{document.where(('metric',))}: metric: no evaluator of the base recipe gives {loaded.study.metric!r}"
            f"{suggest(evaluator, evaluators)}"
        )
    reference = loaded.arm(loaded.study.reference).recipe
    steps = (reference.train.epochs, reference.train.batch_size)
    for number, item in enumerate(loaded.arms):
        arm, recipe, where = item.arm, item.recipe, document.where(("arms", number))
        if not arm.wall_clock_of and (recipe.train.epochs, recipe.train.batch_size) != steps:
            problems.append(
                f"{where}: arm {arm.name}: takes {counted(recipe.train.epochs, 'epoch')} of batches of "
                f"{recipe.train.batch_size}, and the reference {steps[0]} of {steps[1]}; arms are compared at equal "
                "optimiser steps: remove the setting, or give wall_clock_of"
            )
        if arm.wall_clock_of and "train.epochs" in arm.set:
            problems.append(f"{where}: arm {arm.name}: has both train.epochs and wall_clock_of; leave one of them away")
        if arm.wall_clock_of and loaded.as_fast_as(arm) is None:
            problems.append(
                f"{where}: arm {arm.name}: wall_clock_of needs an arm with the same settings and a fixed length, from "
                "which its speed is known; add one"
            )
        ours = str(recipe.variants.store) == STORE_OF_STUDY
        if recipe.uses_variants() and ours and recipe.variants.per_image == "fresh":
            problems.append(
                f"{where}: arm {arm.name}: reads a store, but variants.per_image is fresh; "
                "set variants.per_image to the number of variants that are to be stored of each image"
            )
        if arm.control_of:
            other = loaded.arm(arm.control_of).recipe
            if str(other.variants.store) != STORE_OF_STUDY or other.variants.per_image != recipe.variants.per_image:
                problems.append(
                    f"{where}: arm {arm.name}: control_of: {arm.control_of} must read a store of this study with the "
                    "same variants.per_image"
                )
    return problems


class _Dataset(Section):
    dataset: Annotated[SerializeAsAny[ComponentConfig], Kind("datasets")]


class _Evaluator(Section):
    evaluator: Annotated[SerializeAsAny[ComponentConfig], Kind("evaluators")]


class _Backbone(Section):
    backbone: Annotated[SerializeAsAny[ComponentConfig], Kind("backbones")]


BLOCKS: dict[str, type[Section]] = {"dataset": _Dataset, "evaluator": _Evaluator, "backbone": _Backbone}


def parse_blocks(what: str, texts: Sequence[str]) -> list[ComponentConfig]:
    """Reads blocks from the command line: a name, or `{name: knn, k: 5}`.

    Args:
        what: dataset, evaluator or backbone, the option that they were given by.
        texts: YAML, one block each.

    Returns:
        Their configs; `model_fields_set` says which settings were written down.

    Raises:
        ConfigError: naming the option, for text that is not YAML, unknown names and wrong settings.
    """
    configs = []
    for text in texts:
        document = parse_document(f"{what}: {text}", f"--{what}")
        document.places = dict.fromkeys(document.places, f"--{what} {text!r}")  # a line number would say nothing
        configs.append(getattr(validate(BLOCKS[what], document), what))
    return configs


# ---- Kinds of documents ----


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
