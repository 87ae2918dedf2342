"""What a result depends on, beyond the recipe."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from genssl import __version__
from genssl.base.devices import usable_cores
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.data.folder import by_suffix
from genssl.data.load import unread_of

DIGESTED = 10_000
PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "numpy", "scikit-learn", "grpcio", "protobuf")


def provenance(
    recipe: Recipe, train: ImageDataset, variants: dict[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """Returns versions, machine, digests of recipe and data, and the generator's identity, for results.json."""
    return {
        "genssl": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": {
            "system": platform.platform(),
            "cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
        "seed": recipe.seed,
        "recipe_digest": hashlib.blake2b(recipe.model_dump_json().encode(), digest_size=16).hexdigest(),
        "dataset": {
            "name": train.name,
            "images": len(train),
            "digest": dataset_digest(train),
            "digest_of": f"the source ids of {len(_digested(train))} evenly spaced images",
            "skipped": train.skipped,
            "unread": by_suffix(unread_of(train)),
        },
        "variants": variants or {"source": "none"},
    }


def dataset_digest(dataset: ImageDataset) -> str:
    """Returns 32 hex digits that tell data sets apart."""
    data = hashlib.blake2b(digest_size=16)
    for row in _digested(dataset):
        data.update(dataset.source_id(row))
    return data.hexdigest()


def _digested(dataset: ImageDataset) -> range:
    # A digest of every image would read all of ImageNet once more; evenly spaced ones serve as well.
    return range(0, len(dataset), max(1, len(dataset) // DIGESTED))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
