"""Finds a model: built in, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genssl.errors import GeneratorError, suggest

BUILTIN = Path(__file__).parent / "builtin"
DIFFUSERS = "model_index.json"
OWN = "config.json"


def builtin_models(index: str = DIFFUSERS) -> list[str]:
    """Returns the names that `model: builtin:NAME` accepts, of models whose facts stand in the file `index`."""
    return sorted(path.parent.name for path in BUILTIN.glob(f"*/{index}"))


def find_model(
    model: str, revision: str | None, pipeline: str, parts: Sequence[str] = (), *, key: str = "generator.model"
) -> Path:
    """Returns the folder of a diffusers pipeline, downloading a hub model if it is not in the hub's cache.

    Args:
        model: "builtin:NAME", a folder, or a hub id "owner/name".
        revision: commit or tag of a hub model.
        pipeline: the class that model_index.json must name.
        parts: the sub-folders that are downloaded; by default all.
        key: where the model was named, for messages.

    Raises:
        GeneratorError: saying what was looked for, where, and how to get it.
    """
    folder = _local(model, DIFFUSERS, pipeline)
    if folder is None and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        folder = _download(model, revision, parts, key)
    if folder is None:
        raise GeneratorError(f"{key}: {model!r} is neither a folder here, nor builtin:NAME, nor a hub id (owner/name)")
    index = folder / DIFFUSERS
    if not index.is_file():
        raise GeneratorError(f"{folder}: is not a diffusers model (it has no model_index.json)")
    _check_class(index, pipeline)
    return folder


def find_trained(model: str, kind: str) -> Path:
    """Returns the folder of a model in genssl's own format, as `genssl train-generator` writes it.

    Args:
        model: "builtin:NAME" or a folder.
        kind: what `_class_name` in the folder's config.json must be.

    Raises:
        GeneratorError: saying what was looked for, and how to get it.
    """
    folder = _local(model, OWN, kind)
    if folder is None:
        raise GeneratorError(
            f"generator.model: {model!r} is neither a folder here nor builtin:NAME; make one with "
            "`genssl train-generator RECIPE --out DIR` and set generator.model: DIR"
        )
    index = folder / OWN
    if not index.is_file():
        raise GeneratorError(
            f"{folder}: is not a model that `genssl train-generator` wrote for this generator (it has no config.json)"
        )
    _check_class(index, kind)
    return folder


def _local(model: str, index: str, kind: str) -> Path | None:
    """Returns the folder of a built-in model or one on disk; None if it is neither."""
    if not model.startswith("builtin:"):
        return Path(model) if Path(model).is_dir() else None
    name = model.removeprefix("builtin:")
    fitting = [name for name in builtin_models(index) if read_json(BUILTIN / name / index).get("_class_name") == kind]
    if name not in fitting:
        raise GeneratorError(f"generator.model: there is no built-in model {name!r}{suggest(name, fitting)}")
    return BUILTIN / name


def _check_class(index: Path, kind: str) -> None:
    found = read_json(index).get("_class_name")
    if found != kind:
        raise GeneratorError(f"{index}: the model is a {found}; this generator needs a {kind}")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a model folder's JSON file.

    Raises:
        GeneratorError: if it is missing or broken, as an interrupted download leaves it.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GeneratorError(
            f"{path}: cannot be read ({error}); the model folder is incomplete, get it again"
        ) from None
    return content


def _download(model: str, revision: str | None, parts: Sequence[str], key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Weights as safetensors only: a pickle can run code when it is loaded.
        kinds = ("*.json", "*.txt", "*.safetensors", "*.model")
        wanted = [f"{part}/{kind}" for part in parts for kind in kinds] + [DIFFUSERS] if parts else list(kinds)
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise GeneratorError(
            f"{key}: {model!r} could not be had from the Hugging Face hub ({reason}). "
            "Check the id and the network (private models need HF_TOKEN), or download it elsewhere with "
            f"`hf download {model} --local-dir DIR` and set {key}: DIR"
        ) from None
