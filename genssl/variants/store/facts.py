"""What a store's manifest knows of the recipes that filled it, so that it can be read where no generator is installed.

generator_blocks   a recipe's `generator` block, and the fingerprint and parameters that it came to
datasets           by digest: name, images, and how many variants an image were made
dataset_blocks     the recipes' `dataset` blocks: where path and label of a source can be looked up
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from genssl.base.home import expand_home
from genssl.config.recipe import Recipe
from genssl.variants.key import VariantKey, parameters_digest
from genssl.variants.store.manifest import StoredGenerator, StoreError, StoreManifest, read_manifest, update_manifest
from genssl.variants.store.store import VariantStore

T = TypeVar("T", list[Any], dict[str, Any])
BLOCKS, DATASETS, DATASET_BLOCKS = "generator_blocks", "datasets", "dataset_blocks"
JOINED = 65_536


@dataclass(frozen=True)
class GeneratorFacts:
    """What names the variants that a recipe's generator makes of an image."""

    name: str  # name, model, licence: as `GeneratorSpec` has them
    model: str
    licence: str
    fingerprint: bytes  # 16 bytes
    parameters: Mapping[str, float | int]  # every parameter of the generator
    tflops: float | None = None  # of a variant, as `GeneratorSpec` has it

    def keys(self, source_ids: Sequence[bytes], indices: Sequence[int]) -> list[VariantKey]:
        """Returns the keys of N variants."""
        digest = parameters_digest(self.parameters)
        return [
            VariantKey(source_id, self.fingerprint, digest, index)
            for source_id, index in zip(source_ids, indices, strict=True)
        ]


def describe_contents(
    store: VariantStore,
    facts: GeneratorFacts,
    block: Mapping[str, Any],
    dataset_digest: str,
    dataset: Mapping[str, Any],
    dataset_block: Mapping[str, Any] | None = None,
) -> None:
    """Enters the generator, the block that asked for it, and the data set in the manifest of a store open for writing.

    Args:
        store: whose manifest it is.
        facts: of the generator.
        block, dataset_block: the recipe's blocks, as JSON has them.
        dataset_digest: 32 hex digits.
        dataset: what else is known of the data set; the larger `variants` of this and an earlier entry stays.
    """
    known = store.manifest.generators.get(facts.fingerprint.hex())
    if known is None or known.name != facts.name:
        described = StoredGenerator(name=facts.name, model=facts.model, licence=facts.licence, tflops=facts.tflops)
        store.describe_generator(facts.fingerprint, described)
    entry = {"block": dict(block), "fingerprint": facts.fingerprint.hex(), "parameters": dict(facts.parameters)}

    def change(manifest: StoreManifest) -> StoreManifest:
        blocks, datasets = _told(manifest, BLOCKS, list), _told(manifest, DATASETS, dict)
        if entry not in blocks:
            blocks.append(entry)
        dataset_blocks = _told(manifest, DATASET_BLOCKS, list)
        if dataset_block is not None and dataset_block not in dataset_blocks:
            dataset_blocks.append(dict(dataset_block))
        before = datasets.get(dataset_digest)
        most = max(int(dataset.get("variants", 0)), int(before.get("variants", 0)) if isinstance(before, dict) else 0)
        datasets[dataset_digest] = dict(dataset) | ({"variants": most} if most else {})
        extra: dict[str, Any] = {BLOCKS: blocks, DATASETS: datasets}
        return manifest.model_copy(update=extra | ({DATASET_BLOCKS: dataset_blocks} if dataset_blocks else {}))

    store.manifest = update_manifest(store.folder, change)


def find_generator(manifest: StoreManifest, block: Mapping[str, Any]) -> GeneratorFacts | None:
    """Returns what a recipe's generator block came to, or None if the store does not know it, or knows two answers."""
    entries = _blocks(manifest)
    found = [entry for entry in entries if entry.get("block") == block] or [
        entry for entry in entries if _means(entry.get("block"), block)
    ]
    if len(found) != 1:
        return None
    try:
        fingerprint = bytes.fromhex(found[0]["fingerprint"])
        parameters = {str(name): value for name, value in found[0]["parameters"].items()}
        parameters_digest(parameters)
    except (KeyError, TypeError, ValueError, AttributeError):  # written by someone else
        return None
    known = manifest.generators.get(fingerprint.hex())
    if known is None or len(fingerprint) != 16:
        return None
    return GeneratorFacts(known.name, known.model, known.licence, fingerprint, parameters, known.tflops)


def _means(stored: Any, block: Any) -> bool:
    """Says whether a block that may have been written before some settings came up means what a block of today does."""
    if not isinstance(stored, dict) or not isinstance(block, Mapping):
        return bool(expand_home(stored) == block)
    absent = [name for name in block if name not in stored]
    return all(name in block and _means(value, block[name]) for name, value in stored.items()) and all(
        _is_as_before(name, block) for name in absent
    )


def _is_as_before(name: str, block: Mapping[str, Any]) -> bool:
    """Says whether a setting has the value that stands for what was done before there was the setting."""
    value = block[name]
    if name == "preprocess":  # null is another rule for models that genssl has not trained
        return value == "square" or (value is None and str(block.get("model", "")).startswith("builtin:"))
    return (name in ("heads", "layer_scale") and value is None) or (name == "registers" and value == 0)


def known_parameters(manifest: StoreManifest, digest: bytes) -> dict[str, float | int] | None:
    """Returns the parameters that have a digest, or None if no recipe that filled the store had them."""
    for entry in [{"parameters": {}}, *_blocks(manifest)]:  # without any: of another program's images
        try:
            if parameters_digest(entry["parameters"]) == digest:
                return dict(entry["parameters"])
        except (KeyError, TypeError, ValueError, AttributeError):  # written by someone else
            continue
    return None


def contents_of(manifest: StoreManifest, fingerprint: str) -> dict[str, Any]:
    """Returns what the recipes that filled a store said of one generator and of their data, fit for being handed on.

    Of paths that begin at the root the last part is left: the others are of the machine, and nobody else's business.
    """
    return {
        BLOCKS: [_without_places(entry) for entry in _blocks(manifest) if entry.get("fingerprint") == fingerprint],
        DATASETS: _told(manifest, DATASETS, dict),
    }


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def with_contents(manifest: StoreManifest, contents: Mapping[str, Any]) -> StoreManifest:
    """Returns a manifest that says also what `contents_of` another one did; it keeps what it says itself.

    Data sets that can be opened are not among it: what somebody else wrote must not choose what is read here.
    """
    known = _told(manifest, BLOCKS, list)
    extra: dict[str, Any] = {
        BLOCKS: known + [entry for entry in _of_type(contents.get(BLOCKS), list) if entry not in known],
        DATASETS: _of_type(contents.get(DATASETS), dict) | _told(manifest, DATASETS, dict),
    }
    return manifest.model_copy(update={name: value for name, value in extra.items() if value})


def dataset_blocks(manifest: StoreManifest) -> list[dict[str, Any]]:
    """Returns the dataset blocks of the recipes that filled a store, the latest first."""
    return [dict(block) for block in reversed(_told(manifest, DATASET_BLOCKS, list)) if isinstance(block, dict)]


def _blocks(manifest: StoreManifest) -> list[dict[str, Any]]:
    return [entry for entry in _told(manifest, BLOCKS, list) if isinstance(entry, dict)]


def _told(manifest: StoreManifest, name: str, type_: type[T]) -> T:
    return _of_type((manifest.model_extra or {}).get(name), type_)


def _of_type(value: Any, type_: type[T]) -> T:
    """Returns a copy of what a manifest says, or an empty one if it says something else, or nothing."""
    return type_(value) if isinstance(value, type_) else type_()


class StoredNames:
    """The digests of a store at one moment, for asking after millions of them: 8 bytes each."""

    def __init__(self, store: VariantStore) -> None:
        digests = store.digests()
        parts = [_halves(part) for part in iter(lambda: list(islice(digests, JOINED)), [])]
        self._sorted = np.sort(np.concatenate([_halves([]), *parts]))

    def lack(self, digests: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Returns bool [N], whether each digest of 16 bytes was absent; a wrong "present" has a probability of 2**-64.

        A record counts as present here even if it should turn out damaged when it is read.
        """
        asked = _halves(digests)
        if not len(self._sorted):
            return np.ones(len(asked), np.bool_)
        places = np.minimum(np.searchsorted(self._sorted, asked), len(self._sorted) - 1)
        return np.asarray(self._sorted[places] != asked)


def _halves(digests: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)[:, 0].copy()


def known_fingerprints(recipe: Recipe, store: Path | None = None) -> list[str]:
    """Returns the fingerprints, in hexadecimal, of the variants that a recipe's generator is used beside.

    They are of a log to be replayed, or of a `store`, by default the recipe's.
    """
    found: list[str] = []
    folder = store or recipe.variants.store
    if recipe.variants.replay is not None:  # it goes by one name, whatever others the store may know
        with suppress(OSError, ValueError, KeyError, TypeError), recipe.variants.replay.open() as log:
            found.append(str(json.loads(log.readline())["fingerprint"]))
    if not found and folder is not None and folder.exists():
        with suppress(StoreError):  # who opens it says what is wrong
            manifest = read_manifest(folder)
            found += [*manifest.generators, manifest.pinned or ""]
    return [name for name in found if re.fullmatch(r"[0-9a-f]{32}", name)]
