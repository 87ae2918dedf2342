"""What a result depends on, beyond the recipe."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

from genssl import __version__
from genssl.base.cores import usable_cores
from genssl.base.ranks import Ranks
from genssl.base.versions import package_versions
from genssl.base.wording import counted
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.data.folder import by_suffix
from genssl.data.load import dataset_digest, digested_rows, unread_of


def provenance(
    recipe: Recipe, train: ImageDataset, variants: dict[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """Returns versions, machine, digests of recipe and data, and the generator's identity, for results.json."""
    return {
        "genssl": __version__,
        "packages": package_versions(),
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
            "digest_of": f"the source ids of {len(digested_rows(train))} evenly spaced images",
            "skipped": train.skipped,
            "unread": by_suffix(unread_of(train)),
        },
        "variants": variants or {"source": "none"},
    }


def device_in_words(device: torch.device, ranks: Ranks) -> str:
    """Returns what a run computes on: "cpu (2 threads)"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else counted(torch.get_num_threads(), "thread")
    return f"{device.type} ({name})" if ranks.size == 1 else f"{ranks.size} x {device.type} ({name} each)"
