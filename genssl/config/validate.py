"""Validates documents against pydantic models, and turns every problem into one readable line."""

from __future__ import annotations

import types
import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from genssl.config.base import Choice, ComponentConfig, Kind
from genssl.config.documents.document import Document, KeyPath, dotted
from genssl.errors import ConfigError, suggest
from genssl.registry import REGISTRIES, PluginError, UnknownNameError

M = TypeVar("M", bound=BaseModel)

# Where pydantic speaks of Python's types, the writer of a YAML file should read of YAML's.
PLAIN_WORDS = {
    "model_type": "a mapping of settings is expected",
    "list_type": "a list is expected",
    "tuple_type": "a list is expected",
}


def validate(model: type[M], document: Document) -> M:
    """Validates a document: first every `{name: ...}` block by the Config of the thing it names, then the whole."""
    chosen = model.member_for(document) if issubclass(model, Choice) else model
    problems: list[str] = []
    data = _named_blocks(chosen, document.data, (), document, problems)
    try:
        result = chosen.model_validate(data)
    except ValidationError as error:
        raise ConfigError(problems + explain(error, (), document, chosen)) from None
    if problems:
        raise ConfigError(problems)
    return result  # type: ignore[return-value]


def _named_blocks(
    model: type[BaseModel], data: dict[str, Any], path: KeyPath, document: Document, problems: list[str]
) -> dict[str, Any]:
    """Returns the mapping at `path` with its `{name: ...}` blocks, and those of its sections, as validated configs."""
    done = dict(data)
    for field, info in model.model_fields.items():
        kind = next((mark.kind for mark in info.metadata if isinstance(mark, Kind)), None)
        value, here = data.get(field), (*path, field)
        if field not in data or (value is None and info.default is None):
            continue
        if kind is None:
            section = _section(info.annotation)
            if section is not None and isinstance(value, dict):
                done[field] = _named_blocks(section, value, here, document, problems)
        elif typing.get_origin(info.annotation) is list:
            done[field] = _blocks(kind, value, here, document, problems)
        else:
            done[field] = _block(kind, value, here, document, problems)
    return done


def _section(annotation: Any) -> type[BaseModel] | None:
    """Returns the model that a field's annotation is or, as in `Section | None`, has among its members."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for item in typing.get_args(annotation) if union else (annotation,):
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None


def _blocks(kind: str, value: Any, path: KeyPath, document: Document, problems: list[str]) -> list[ComponentConfig]:
    """Validates a list of `{name: ...}` blocks; what fails is added to `problems` and replaced by a stand-in."""
    if isinstance(value, list):
        return [_block(kind, item, (*path, index), document, problems) for index, item in enumerate(value)]
    problems.append(f"{document.where(path)}: {dotted(path)}: a list of blocks is expected, [{{name: ...}}, ...]")
    return [ComponentConfig(name=dotted(path))]


def _block(kind: str, value: Any, path: KeyPath, document: Document, problems: list[str]) -> ComponentConfig:
    """Validates one `{name: ...}` block; what fails is added to `problems` and replaced by a stand-in.

    The stand-in is valid and has a name of its own: the rest of the document is judged as if the block were right.
    """
    stand_in = ComponentConfig(name=dotted(path))
    registry = REGISTRIES[kind]
    if isinstance(value, str):
        value = {"name": value}  # `evaluate: [knn]` is short for `evaluate: [{name: knn}]`
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        allowed = ", ".join(registry.names())
        problems.append(
            f"{document.where(path)}: {dotted(path)}: a block with a name is expected, {{name: ...}}; "
            f"allowed names: {allowed}"
        )
        return stand_in
    try:
        model = registry.config(value["name"])
        require_component(kind, value["name"], model)
    except (UnknownNameError, PluginError) as error:
        problems.append(f"{document.where((*path, 'name'))}: {dotted(path)}.name: {error}")
        return stand_in
    try:
        config = model.model_validate(value)
    except ValidationError as error:
        problems += explain(error, path, document, model)
        return stand_in
    return typing.cast(ComponentConfig, config)


def require_component(kind: str, name: str, model: Any) -> None:
    """Raises PluginError if what a plug-in gives for its Config cannot validate a block of a recipe."""
    if isinstance(model, type) and issubclass(model, ComponentConfig):
        return
    shown = f"{model.__module__}.{model.__qualname__}" if isinstance(model, type) else repr(model)
    raise PluginError(
        f"the plug-in for {name!r} among the {kind} cannot be used: its Config is {shown}, which does not derive from "
        "genssl.config.base.ComponentConfig; correct that in the plug-in, or uninstall it"
    )


def explain(error: ValidationError, prefix: KeyPath, document: Document, model: type[BaseModel]) -> list[str]:
    """Returns pydantic's errors as lines "file:line: key.path: what was found; what is allowed".

    Args:
        error: what validating the part of the document at `prefix` by `model` raised.
        prefix: key path of that part.
        document: knows the places.
        model: knows the keys that are allowed.
    """
    found: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        found.setdefault(_key_path(detail["loc"], prefix, document, model), []).append(detail)
    lines = []
    for path, details in found.items():
        if len(details) == 1:
            problem = _problem(details[0], path, model, prefix)
        else:  # every member of a union has refused the value
            problem = f"{_shown(details[0]['input'])}{', or '.join(_message(detail) for detail in details)}"
        lines.append(f"{document.where(path)}: {dotted(path) or 'document'}: {problem}")
    return lines


def _problem(detail: ErrorDetails, path: KeyPath, model: type[BaseModel], prefix: KeyPath) -> str:
    value = detail["input"]
    if detail["type"] == "extra_forbidden":
        return f"unknown key{suggest(str(path[-1]), _fields_at(model, path[len(prefix) : -1]))}"
    if detail["type"] == "missing":
        return "is missing; add it"
    if detail["type"] == "literal_error":
        expected = [name.strip("' ") for name in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(",")]
        return f"{value!r} is not allowed{suggest(str(value), expected)}"
    return f"{_shown(value)}{_message(detail)}"


def _message(detail: ErrorDetails) -> str:
    message = PLAIN_WORDS.get(detail["type"], detail["msg"]).removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _shown(value: Any) -> str:
    """Returns "value: " for a scalar or a list of scalars; a longer value would drown the message."""
    items = value if isinstance(value, list) else [value]
    return f"{value!r}: " if all(isinstance(item, str | int | float | None) for item in items) else ""


def _key_path(loc: tuple[str | int, ...], prefix: KeyPath, document: Document, model: type[BaseModel]) -> KeyPath:
    """Returns `loc` without the parts that pydantic adds to tell the members of a union apart."""
    value: Any = document.data
    for part in prefix:
        value = value[part]
    path: KeyPath = ()
    for part in loc:
        written = isinstance(value, list) if isinstance(part, int) else isinstance(value, dict) and part in value
        if written or part in _fields_at(model, path):
            path = (*path, part)
            value = _item(value, part)
    return (*prefix, *path)


def _item(value: Any, part: str | int) -> Any:
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return None


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """Returns the keys that `model` allows at `path`, following nested models and lists of them."""
    current: Any = model
    for part in path:
        if (
            isinstance(part, str)
            and isinstance(current, type)
            and issubclass(current, BaseModel)
            and part in current.model_fields
        ):
            current = current.model_fields[part].annotation
        candidates = [current, *typing.get_args(current)]
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        current = nested[0] if nested else current
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []
