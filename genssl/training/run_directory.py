"""The directory of a run: who has it, whether it holds a run, and what of a run that goes on may change.

A run that never began leaves its directory as it was. Imports no torch, since commands that only look need none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssl.base.files import is_claimed, provisional, write_atomically
from genssl.config.comparable import differences
from genssl.config.documents.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError

RECIPE, AS_BEGUN = "recipe.yaml", "recipe-begun.yaml"  # the latter only if the run was lengthened since
RESULTS, REPORT, SAMPLES, ENCODER = "results.json", "report.html", "samples.png", "encoder.safetensors"
SHOWN = 5  # settings that an error names
# What a run may write before its first step is done.
EARLY = (RECIPE, "server*.log", "metrics.jsonl", "metrics.csv", "assignments.jsonl", "tensorboard", "wandb", ".*.part")


class RunDirectory:
    """A run directory that this process has for itself; `begun` once there is something of the run to keep."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.begun = False

    def begin(self, recipe: Recipe) -> None:
        """Writes down which run this is; called when there is something to keep, and once is enough.

        Where the run had another length before, what that came to is set aside first. A process that is killed in
        between leaves a run of the former length, or one of the new length, that can be resumed.
        """
        if self.begun:
            return
        self.begun = True
        if (self._path / RECIPE).exists() and holds_run(self._path):
            before = load(Recipe, self._path / RECIPE).train.epochs
            if before == recipe.train.epochs:
                return  # checkpoints name its bytes, which a genssl of fewer settings may have written
            self._set_aside(before)
        write_atomically(self._path / RECIPE, lambda path: path.write_text(to_yaml(recipe)))

    def _set_aside(self, epochs: int) -> None:
        if (self._path / RESULTS).exists():
            os.replace(self._path / RESULTS, self._path / f"results-{epochs}-epochs.json")
            for name in (REPORT, SAMPLES):
                (self._path / name).unlink(missing_ok=True)
            if (self._path / ENCODER).exists():
                os.replace(self._path / ENCODER, self._path / f"encoder-{epochs}-epochs.safetensors")
        if not (self._path / AS_BEGUN).exists():
            write_atomically(self._path / AS_BEGUN, lambda path: path.write_bytes((self._path / RECIPE).read_bytes()))


@contextmanager
def hold(out: Path, *, resume: bool) -> Iterator[RunDirectory]:
    """Holds a run directory, which is made if it is absent; a run that has not begun at the end leaves nothing in it.

    What a killed process left without a checkpoint and without a row of its log is taken up. To `resume`, it may hold
    a run.

    Raises:
        UserError: if it cannot be made, another process has it, or it holds a run already.
    """
    directory = RunDirectory(out)
    with provisional(out, lambda: directory.begun, EARLY):
        if not resume:
            refuse_used(out)  # another process may have begun one since
        yield directory


def refuse_used(out: Path) -> None:
    """Raises UserError if `out` holds a run already, or is not a directory."""
    if holds_run(out):
        raise UserError(f"{out} holds a run already; give another directory with --out, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory with --out")


def recipe_begun(out: Path, recipe: Recipe) -> bytes:
    """Returns the recipe that a run was begun with, as it was written then; of one that begins now, as it will be."""
    for name in (AS_BEGUN, RECIPE) if holds_run(out) else ():
        if (out / name).exists():
            return (out / name).read_bytes()
    return to_yaml(recipe).encode()


def holds_run(out: Path) -> bool:
    """Says whether there is anything of a run to lose: results, a checkpoint, or a row of its log."""
    log = out / "metrics.jsonl"
    return (out / RESULTS).exists() or any(out.glob("checkpoint*.pt")) or (log.is_file() and log.stat().st_size > 0)


def is_finished(out: Path) -> bool:
    """Says whether a run directory holds a run that has nothing left to do; the report is its last file."""
    return (out / RESULTS).exists() and (out / REPORT).exists()


def read_results(out: Path) -> dict[str, Any]:
    """Returns the content of a finished run's results.json."""
    results: dict[str, Any] = json.loads((out / RESULTS).read_text())
    return results


# ---- Going on with a run ----
def recipe_of(folder: Path, settings: Sequence[str] = ()) -> Recipe:
    """Returns the recipe of a run directory, with `key.path=value` settings upon it.

    Raises:
        UserError: if it is not a run directory.
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
    """Returns what results.json says of it if a run goes on with another number of epochs; `epochs_done` by now.

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


# ---- Runs that have not finished ----
@dataclass(frozen=True)
class UnfinishedRun:
    """A run that is under way or was interrupted: name, seed and length of its recipe, the epochs that its log has."""

    name: str
    seed: int
    epochs_done: int
    epochs: int
    state: str  # in words, with what to do about it


def unfinished_runs(folder: Path) -> list[UnfinishedRun]:
    """Reads every run directly below a folder that has no results."""
    found = []
    for path in sorted(folder.glob("*/recipe.yaml")):
        out = path.parent
        if (out / RESULTS).exists():
            continue
        try:
            recipe = load(Recipe, path)
        except UserError:  # of another version of genssl, or not a run
            continue
        if is_claimed(out):
            state = "running"
        elif any(out.glob("checkpoint*.pt")):
            state = f"interrupted; continue with: genssl run --resume {out}"
        else:
            state = f"interrupted before its first checkpoint; begin again with: genssl run --resume {out}"
        found.append(UnfinishedRun(recipe.name, recipe.seed, _epochs_logged(out), recipe.train.epochs, state))
    return found


def _epochs_logged(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):  # the last line of a run that was killed may be half a line
            return int(json.loads(line)["epoch"])
    return 0
