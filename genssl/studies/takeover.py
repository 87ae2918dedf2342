"""Which finished runs in a study's folder are what the study now asks for, and what becomes of the others."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssl.base.files import write_json
from genssl.config.comparable import deciding, differences
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.studies.stores import StudyStores
from genssl.training.checkpoint import LATEST

RUNS = "runs"
ENCODER = "encoder.safetensors"
REPLACED = "replaced"  # the folder of runs that were set aside, and, as JSON, why
SHOWN = 3


@dataclass(frozen=True)
class RequestedRun:
    """A run that a study asks for, its store filled in; `unknown` settings of `train` follow from other runs."""

    arm: str
    seed: int
    recipe: Recipe
    unknown: tuple[str, ...] = ()


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Returns the directory of an arm's run at a seed."""
    return out / RUNS / arm / f"seed-{seed}"


def is_finished(folder: Path) -> bool:
    """Says whether a run directory holds results and weights."""
    return (folder / "results.json").is_file() and (folder / ENCODER).is_file()


def differing(folder: Path, recipe: Recipe, stores: StudyStores, unknown: Iterable[str] = ()) -> list[str]:
    """Returns in what a finished run differs from what the recipe would give now; nothing: the run stands for it.

    `unknown` settings of `train` are left out. The study, and with it its stores, may have moved since the run.
    """
    there = load(Recipe, folder / "recipe.yaml")
    before, now = _deciding(there, stores), _deciding(recipe, stores)
    for name in unknown:
        del before["train"][name], now["train"][name]
    # What else of the variants differs follows from another source of them.
    sources = [{"source": one["variants"]["source"]} for one in (before, now)]
    return differences(sources[0], sources[1], "variants") or differences(before, now)


def _deciding(recipe: Recipe, stores: StudyStores) -> dict[str, Any]:
    """Returns what decides a run; a store of the study goes by its name, wherever the study lay when it was used."""
    found, store = deciding(recipe), recipe.variants.store
    if store is not None and "store" in found["variants"]:
        own = stores.folder(recipe).parts[-2:] if recipe.generator is not None else ()
        found["variants"]["store"] = "/".join(own) if store.parts[-2:] == own else str(store.resolve())
    return found


def require_same_study(out: Path, requested: Iterable[RequestedRun], stores: StudyStores) -> None:
    """Raises UserError if runs are finished and none of them is what the study asks for.

    Of arms that have changed the runs are set aside and made anew. If every one has, then the folder is another
    study's, or a setting was mistyped, and nothing is touched.
    """
    found = [
        (folder, differing(folder, run.recipe, stores, run.unknown))
        for run in requested
        if is_finished(folder := run_folder(out, run.arm, run.seed))
    ]
    if found and all(why for _, why in found):
        folder, why = found[0]
        raise UserError(
            f"{folder}: holds a finished run of other settings than the study now gives it: {_first_of(why)}"
            f"{'; so does every other there' if len(found) > 1 else ''}. Give another --out, or remove what is finished"
        )


def set_aside(out: Path, arm: str, seed: int, why: list[str]) -> str:
    """Moves a finished run out of the way, keeps it, and writes down why; returns a line for the user."""
    folder, kept = run_folder(out, arm, seed), out / REPLACED / arm / f"seed-{seed}"
    number = 1
    while kept.exists():
        number += 1
        kept = kept.with_name(f"seed-{seed}-{number}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    line = f"{arm}, seed {seed}: is run anew; the finished run had other settings: {_first_of(why)}"
    write_json(out / f"{REPLACED}.json", [*replaced(out), f"{line}; it is kept in {kept.relative_to(out)}"])
    folder.rename(kept)
    return f"{line}; it is kept in {kept}"


def replaced(out: Path) -> list[str]:
    """Returns, in sentences, which runs were set aside for others, and why."""
    path = out / f"{REPLACED}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _first_of(why: list[str]) -> str:
    return ", ".join(why[:SHOWN]) + (f" and {len(why) - SHOWN} more" if len(why) > SHOWN else "")


def can_resume(folder: Path, recipe: Recipe) -> bool:
    """Says whether an interrupted run can go on and end as if it had not been; it cannot if it reuses variants."""
    if not (folder / LATEST).is_file() or recipe.variants.late == "reuse":
        return False
    return load(Recipe, folder / "recipe.yaml") == recipe
