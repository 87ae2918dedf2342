"""Where a recipe meets a store: what the manifest says of it, and whether the store has what a run will want."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from genssl.config.recipe import Recipe, VariantsConfig
from genssl.data.base import ImageDataset
from genssl.variants.plan import ViewPlan
from genssl.variants.replay import Replay
from genssl.variants.source import REAL
from genssl.variants.store.facts import StoredNames
from genssl.variants.store.manifest import MANIFEST, StoreError, foreign_to, read_manifest
from genssl.variants.store.source import StoredVariants
from genssl.variants.store.store import VariantStore


def generator_block(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe's generator block as a store's manifest keeps it; the id on a server is no part of it."""
    assert recipe.generator is not None
    return recipe.generator.model_dump(mode="json", exclude={"id"})


def dataset_block(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe's dataset block as a store's manifest keeps it, readable from any folder."""
    block = recipe.dataset.model_dump(mode="json", exclude={"download"})
    for name in ("root", "test_root"):
        if isinstance(path := getattr(recipe.dataset, name, None), Path):
            block[name] = str(path.expanduser().absolute())
    return block


def refuse_foreign(folder: Path, where: str) -> None:
    """Raises StoreError if a folder, which may be absent, can never become or be a store.

    Before anything expensive, and without a trace; `where` is the option or key path that named it.
    """
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{where}: {folder} is a file; give a folder")
    if folder.is_dir() and (foreign_to(folder) is not None or (folder / MANIFEST).exists()):
        read_manifest(folder)


def store_provenance(store: VariantStore) -> dict[str, Any]:
    """Returns what results.json says of the store."""
    manifest = store.manifest
    return {
        "path": str(store.folder),
        "records": len(store),
        "bytes": store.bytes,
        "manifest": manifest.model_dump(mode="json", exclude={"generator_blocks", "dataset_blocks"}),
    }


def require_planned(
    stored: StoredVariants, plan: ViewPlan | Replay, epochs: int, dataset: ImageDataset, variants: VariantsConfig
) -> None:
    """Looks at the whole plan of a run, before its first step.

    Raises:
        StoreError: if the store lacks variants, saying how many and how to make them.
    """
    names = StoredNames(stored.store)
    seen: dict[int, npt.NDArray[np.bool_]] = {}  # by index, which rows were looked at
    planned = lacking = highest = 0
    for epoch in range(epochs):
        for index, rows in _by_index(plan, epoch).items():
            known = seen.setdefault(index, np.zeros(len(dataset), np.bool_))
            fresh = np.unique(rows[~known[rows]])
            known[fresh] = True
            if not len(fresh):
                continue
            keys = stored.facts.keys([dataset.source_id(int(row)) for row in fresh], [index] * len(fresh))
            absent = int(names.lack([key.digest() for key in keys]).sum())
            planned, lacking = planned + len(fresh), lacking + absent
            if absent:
                highest = max(highest, index)
    if not lacking:
        return
    what = f"variants.store: {stored.store.folder} lacks {lacking:,} of the {planned:,} variants that this run plans"
    manifest, meant = stored.store.manifest, stored.facts.fingerprint.hex()
    if lacking == planned and meant in manifest.generators:
        what += " (it holds variants of this generator, but with other parameters, or of other images)"
    elif lacking == planned and manifest.generators:
        held = "; ".join(map(manifest.describe, manifest.generators))
        what += f" (it holds variants of {held}; the recipe's generator is {stored.facts.name} ({stored.facts.model}), "
        what += f"fingerprint {meant})"
    if variants.per_image == "fresh":
        advice = "variants.per_image is fresh, which plans variants of this run's own; set it to the number stored"
    else:
        advice = f"Make them: {pregenerate_command(variants, highest + 1)}"
    raise StoreError(f"{what}. {advice}; or set variants.missing: generate or real")


def _by_index(plan: ViewPlan | Replay, epoch: int) -> dict[int, npt.NDArray[np.int64]]:
    """Returns, by index, the rows whose variant of that index an epoch wants."""
    steps = [plan.step(epoch, step) for step in range(plan.steps_per_epoch)]
    rows = np.concatenate([step.rows for step in steps])
    indices = np.concatenate([step.indices for step in steps])
    return {int(index): rows[(indices == index).any(axis=1)] for index in np.unique(indices[indices != REAL])}


def pregenerate_command(variants: VariantsConfig, count: int | None = None) -> str:
    """Returns what makes the variants that a recipe's store lacks, for messages."""
    number = count or (10 if variants.per_image == "fresh" else variants.per_image)
    if variants.per_image != "fresh":
        number = max(number, variants.per_image)
    return (
        f"`genssl pregenerate RECIPE --store {variants.store} --variants {number}`, with this recipe and its settings"
    )
