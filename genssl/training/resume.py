"""Going on with a run: what must be as it was, what is known to differ, and where its logs are cut."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import torch

from genssl.config.comparable import differences
from genssl.config.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.errors import UserError
from genssl.training.distributed import Ranks
from genssl.training.files import write_atomically
from genssl.training.provenance import dataset_digest

SHOWN = 5


def is_finished(folder: Path) -> bool:
    """Says whether a run directory holds a run that has nothing left to do; the report is its last file."""
    return (folder / "results.json").exists() and (folder / "report.html").exists()


def recipe_of(folder: Path) -> Recipe:
    """Returns the recipe of a run directory.

    Raises:
        UserError: if it is no run directory.
    """
    if not (folder / "recipe.yaml").exists():
        raise UserError(
            f"--resume {folder}: holds no run (no recipe.yaml); give the directory of a run, or the recipe as well to "
            "begin one there"
        )
    return load(Recipe, folder / "recipe.yaml")


def require_same(recipe: Recipe, folder: Path) -> None:
    """Raises UserError, naming what differs, if a run directory was begun with another recipe."""
    if not (folder / "recipe.yaml").exists():
        return
    begun = recipe_of(folder)
    # As written: a number of the same value may have come as 1 or as 1.0.
    if to_yaml(begun) == to_yaml(recipe):
        return
    differing = differences(begun.model_dump(mode="json"), recipe.model_dump(mode="json"))
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    raise UserError(
        f"--resume {folder}: was begun with another recipe: {', '.join(differing[:SHOWN])}{more}. "
        f"Leave the recipe out (genssl run --resume {folder}), or start another run with --out"
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


def identity(recipe: Recipe, dataset: ImageDataset) -> dict[str, str]:
    """Returns what a checkpoint and the run that goes on from it must agree on, the generator left out."""
    digest = hashlib.blake2b(to_yaml(recipe).encode(), digest_size=16).hexdigest()
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
