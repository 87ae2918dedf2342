"""Going on with a run: what must be as it was, what is known to differ, and where its logs are cut."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genssl.base.files import write_atomically
from genssl.base.ranks import Ranks
from genssl.config.comparable import differences
from genssl.config.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.data.load import dataset_digest
from genssl.errors import UserError
from genssl.training.run_directory import AS_BEGUN, RECIPE, holds_run

SHOWN = 5


def recipe_of(folder: Path, settings: Sequence[str] = ()) -> Recipe:
    """Returns the recipe of a run directory, with `key.path=value` settings upon it.

    Raises:
        UserError: if it is no run directory.
    """
    if not (folder / RECIPE).exists():
        raise UserError(
            f"--resume {folder}: holds no run (no recipe.yaml); give the directory of a run, or the recipe as well to "
            "begin one there"
        )
    return load(Recipe, folder / RECIPE, settings)


def as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """Returns the recipe that a run directory was begun with, which differs from `recipe` in train.epochs at most.

    Raises:
        UserError: naming what else differs.
    """
    if not holds_run(folder) or not (folder / RECIPE).exists():
        return recipe
    # As written: a number of the same value may have come as 1 or as 1.0.
    there = of_length(recipe_of(folder), recipe.train.epochs)
    if to_yaml(there) != to_yaml(recipe):
        differing = differences(there.model_dump(mode="json"), recipe.model_dump(mode="json"))
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise UserError(
            f"--resume {folder}: was begun with another recipe: {', '.join(differing[:SHOWN])}{more}. Of a run that "
            "goes on only train.epochs can be changed. Leave the recipe and other settings out "
            f"(genssl run --resume {folder}), or start another run (genssl run {folder / RECIPE} KEY=VALUE --out DIR)"
        )
    return load(Recipe, folder / AS_BEGUN) if (folder / AS_BEGUN).exists() else recipe_of(folder)


def of_length(recipe: Recipe, epochs: int) -> Recipe:
    """Returns a recipe with another number of epochs."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": epochs})})


def changed_length(recipe: Recipe, folder: Path, epochs_done: float) -> dict[str, int]:
    """Returns what results.json says of it if a run goes on with another number of epochs.

    Args:
        recipe: of the run from now on.
        folder: the run directory.
        epochs_done: by its checkpoint.

    Raises:
        UserError: if what is done is not what it would be in a run that had this length from the beginning.
    """
    if not (folder / RECIPE).exists():  # another machine than the first one, which has it
        return {}
    epochs, before = recipe.train.epochs, recipe_of(folder).train.epochs
    if epochs == before:
        return {}
    schedule, method = recipe.schedule, recipe.method
    if epochs_done > epochs:
        why = f"{epochs_done:g} are done"
    elif schedule.name == "cosine" and epochs_done > schedule.warmup_epochs:
        why = (
            f"its schedule is a cosine over {before} epochs, and after {epochs_done:g} of them the "
            f"learning rate has been another than in a run of {epochs} (only schedule.name: constant does not depend "
            "on the length)"
        )
    elif getattr(method, "depends_on_length", True):  # a plug-in may say nothing of it
        why = f"{method.name} does in each step what depends on the part of the training that is done"
    elif recipe.variants.budget is not None:
        why = "variants.budget is spread over all epochs"
    else:
        return {"epochs_before": before}
    raise UserError(
        f"--resume {folder}: train.epochs cannot be changed from {before} to {epochs}: {why}. Start a run of {epochs} "
        f"epochs: genssl run {folder / RECIPE} train.epochs={epochs}"
    )


def require_same_step(ranks: Ranks, folder: Path, step: int) -> None:
    """Raises UserError on every rank if their checkpoints are of different steps: machines without a shared folder.

    Args:
        ranks: of the run.
        folder: the run directory.
        step: of the checkpoint that this rank goes on from; 0 if it found none.
    """
    found = ranks.gather((step, socket.gethostname()))
    first, here = found[0]
    for other, there in found:
        if other != first:
            raise UserError(
                f"--resume {folder}: rank 0 on {here} goes on from step {first}, but a rank on {there} "
                f"{f'from step {other}' if other else 'found no checkpoint'}; put the run directory where every "
                f"machine sees it, or copy it from {here} to the same path on the others"
            )


def identity(recipe: bytes, dataset: ImageDataset) -> dict[str, str]:
    """Returns what a checkpoint and the run that goes on from it must agree on, the generator left out.

    Args:
        recipe: as it was written when the run was begun, so that settings which have come up since change nothing.
        dataset: that is trained on.
    """
    digest = hashlib.blake2b(recipe, digest_size=16).hexdigest()
    return {"recipe": digest, "dataset": dataset_digest(dataset)}


def entry(recipe: Recipe, device: torch.device, step: int) -> dict[str, Any]:
    """Returns what results.json says of one resumption: at which step, and whether it is exact."""
    reason = inexact(recipe, device)
    if reason is None:
        return {"step": step, "exact": True}
    return {"step": step, "exact": False, "because": reason}


def inexact(recipe: Recipe, device: torch.device) -> str | None:
    """Returns why a resumed run may end with other weights than an uninterrupted one; None if it may not."""
    variants = recipe.variants
    makes = recipe.uses_variants() and (variants.source != "stored" or variants.missing == "generate")
    if makes and variants.source == "online" and variants.late != "block" and variants.replay is None:
        return f"variants.late is {variants.late}: which variants come late depends on time" + (
            ", and the pool of those received begins empty" if variants.late == "reuse" else ""
        )
    if makes and variants.source == "online" and variants.server != "embedded":
        return "the server of variants.server may batch them differently, which can change a pixel by one grey level"
    if makes and variants.batching != "deterministic":
        return "variants.batching is dynamic: in another batch a pixel of a variant can differ by one grey level"
    if device.type != "cpu":
        return f"on {device.type} kernels do not add in the same order each time"
    if recipe.train.threads == "auto":
        return "train.threads is auto: sums depend on how many threads share them"
    return None


def cut_back(path: Path, step: int) -> None:
    """Removes from a log of JSON lines what was written after `step` optimiser steps; half a line goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(line + "\n")
    write_atomically(path, lambda partial: partial.write_text("".join(kept)))
