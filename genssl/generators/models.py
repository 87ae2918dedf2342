"""Finds a model: built in, in a folder, or on the Hugging Face hub; and says whether it suits the images it gets."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genssl.errors import GeneratorError, suggest

BUILTIN = Path(__file__).parent / "builtin"
DIFFUSERS = "model_index.json"
OWN = "config.json"
CARD = "card.json"
OTHERS = (
    "make one of your own images with `genssl train-generator recipes/generators/folder_flow.yaml dataset.root=FOLDER "
    "--out my-flow` and name {name: flow, model: my-flow} in its place, or name another generator"
)


def builtin_models(index: str = DIFFUSERS) -> list[str]:
    """Returns the names that `model: builtin:NAME` accepts, of models whose facts stand in the file `index`."""
    return sorted(path.parent.name for path in BUILTIN.glob(f"*/{index}"))


def find_model(
    model: str,
    revision: str | None,
    pipeline: str | Sequence[str],
    parts: Sequence[str] = (),
    *,
    key: str = "generator.model",
) -> Path:
    """Returns the folder of a diffusers pipeline, downloading a hub model if it is not in the hub's cache.

    Args:
        model: "builtin:NAME", a folder, or a hub id "owner/name".
        revision: commit or tag of a hub model.
        pipeline: the class that model_index.json must name, or the classes of which it must name one.
        parts: the sub-folders that are downloaded; by default all.
        key: where the model was named, for messages.

    Raises:
        GeneratorError: saying what was looked for, where, and how to get it.
    """
    kinds = (pipeline,) if isinstance(pipeline, str) else tuple(pipeline)
    folder = _local(model, DIFFUSERS, *kinds) or _from_hub(model, revision, parts, key)
    if folder is None:
        raise GeneratorError(f"{key}: {model!r} is neither a folder here, nor builtin:NAME, nor a hub id (owner/name)")
    return _checked(folder, DIFFUSERS, kinds, f"{folder}: is not a diffusers model (it has no model_index.json)")


def shown(reference: str) -> str:
    """Returns what of a model's name, or another setting, others may see: of a path on this machine, its last part."""
    local = reference.startswith(("/", "./", "../", "~/"))
    # A long prompt is no file name, at which Path.exists would raise.
    local = local or ("/" in reference and os.path.exists(reference))  # noqa: PTH110
    return (Path(reference).name or "model") if local else reference


def find_network(model: str, kind: str, setting: str) -> Path:
    """Does as `find_model` with a single network, such as an autoencoder, in a folder or on the hub."""
    folder = Path(model) if Path(model).is_dir() else _from_hub(model, None, (), setting)
    if folder is None:
        raise GeneratorError(f"{setting}: {model!r} is neither a folder here nor a hub id (owner/name)")
    return _checked(folder, OWN, (kind,), f"{setting}: {folder} is not a diffusers model (it has no config.json)")


def find_trained(model: str, kind: str) -> Path:
    """Does as `find_model` with a model in genssl's own format, built in or of `genssl train-generator`."""
    folder = _local(model, OWN, kind)
    if folder is None:
        raise GeneratorError(
            f"generator.model: {model!r} is neither a folder here nor builtin:NAME; make one with "
            "`genssl train-generator RECIPE --out DIR` and set generator.model: DIR"
        )
    missing = "is not a model that `genssl train-generator` wrote for this generator (it has no config.json)"
    return _checked(folder, OWN, (kind,), f"{folder}: {missing}")


def _local(model: str, index: str, *kinds: str) -> Path | None:
    """Returns the folder of a built-in model or one on disk; None if it is neither."""
    if not model.startswith("builtin:"):
        return Path(model) if Path(model).is_dir() else None
    name = model.removeprefix("builtin:")
    fitting = [name for name in builtin_models(index) if read_json(BUILTIN / name / index).get("_class_name") in kinds]
    if name not in fitting:
        raise GeneratorError(f"generator.model: there is no built-in model {name!r}{suggest(name, fitting)}")
    return BUILTIN / name


def _from_hub(model: str, revision: str | None, parts: Sequence[str], key: str) -> Path | None:
    """Returns the folder of a hub id, downloaded if need be; None if it is none."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        return None
    return _download(model, revision, parts, key)


def _checked(folder: Path, index: str, kinds: Sequence[str], missing: str) -> Path:
    """Returns a folder whose index names one of the kinds; says what is `missing` if there is no index."""
    if not (folder / index).is_file():
        raise GeneratorError(missing)
    found = read_json(folder / index).get("_class_name")
    if found not in kinds:
        raise GeneratorError(f"{folder / index}: the model is a {found}; this generator needs a {' or a '.join(kinds)}")
    return folder


def find_file(reference: str, key: str) -> Path:
    """Returns a safetensors file here, or OWNER/NAME[@REVISION]/FILE of the hub; `key` says where it was named."""
    if not reference.endswith(".safetensors"):
        raise GeneratorError(f"{key}: {reference!r} is not a .safetensors file; other formats can run code when loaded")
    path = Path(reference) if Path(reference).is_file() else _hub_part(reference, key, whole=False)
    if not path.is_file():
        raise GeneratorError(f"{key}: {reference!r} is not there")
    return path


def find_part(reference: str, key: str) -> Path:
    """Returns a folder here, or OWNER/NAME[@REVISION]/FOLDER of the hub, downloaded if need be; see `find_file`."""
    path = Path(reference) if Path(reference).is_dir() else _hub_part(reference, key, whole=True)
    if not path.is_dir():
        raise GeneratorError(f"{key}: {reference!r} is not there")
    return path.resolve() if path.name in ("", "..") else path


def _hub_part(reference: str, key: str, *, whole: bool) -> Path:
    owner, _, rest = reference.partition("/")
    name, _, inside = rest.partition("/")
    if not inside or owner in ("", ".", "..", "~"):
        what = "folder" if whole else "file"
        raise GeneratorError(f"{key}: {reference!r} is neither a {what} here nor OWNER/NAME/{what.upper()} on the hub")
    name, _, revision = name.partition("@")
    folder = _download(f"{owner}/{name}", revision or None, [inside], key, whole=whole, inside=[inside])
    return folder / inside


def read_json(path: Path) -> dict[str, Any]:
    """Returns a model folder's JSON file; raises GeneratorError if it is broken, as a download may leave it."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise GeneratorError(
            f"{path}: cannot be read ({error}); the model folder is incomplete, get it again"
        ) from None
    return content


def licence_of(folder: Path, otherwise: str) -> str:
    """Returns the licence that a model's card.json names, or `otherwise`."""
    card = folder / "card.json"
    licence = read_json(card).get("licence") if card.exists() else None
    return licence or otherwise


def _download(
    model: str, revision: str | None, parts: Sequence[str], key: str, *, whole: bool = True, inside: Sequence[str] = ()
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Weights as safetensors only: a pickle can run code when it is loaded.
        kinds = ("*.json", "*.txt", "*.safetensors", "*.model", "*.jinja")
        wanted = [f"{part}/{kind}" for part in parts for kind in kinds] + [DIFFUSERS] if parts else list(kinds)
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted if whole else list(parts)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise GeneratorError(
            f"{key}: {model!r} could not be had from the Hugging Face hub ({reason}). "
            "Check the id and the network (private models need HF_TOKEN), or download it elsewhere with "
            f"`hf download {model} --local-dir DIR` and set {key}: {'/'.join(['DIR', *inside])}"
        ) from None


def trained_on(model: str) -> str | None:
    """Returns the registry name of the data set that a built-in model was trained on; None for any other model.

    Args:
        model: as a config or a server names it, such as "builtin:digits-flow".
    """
    name = model.removeprefix("builtin:")
    card = BUILTIN / name / CARD
    if name == model or "/" in name or not card.is_file():
        return None
    return str(read_json(card)["dataset"]["name"])


def foreign_data(model: str, found: str) -> str:
    """Says that a built-in model was not trained on what was `found`, and what to use instead."""
    return (
        f"{model} was trained on the data set {trained_on(model)} alone and makes such images of whatever it is given, "
        f"but {found}; {OTHERS}"
    )


def small_variants(variant: int, view: int) -> str | None:
    """Says that variants of so many pixels (short side) are smaller than views of so many; None if they are not."""
    if variant >= view:
        return None
    return (
        f"the variants have {variant} pixels a side and the views {view}, so that they are enlarged and lack what "
        "real images show; raise the generator's output_size or image_size where it has one, lower the size of the "
        "views, or name another generator (`genssl train-generator` makes one of your own images)"
    )
