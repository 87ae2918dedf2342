"""The directory of a run: who has it, whether it holds a run, and that a run which never began leaves it as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genssl.base.files import provisional, write_atomically
from genssl.config.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError

RECIPE, AS_BEGUN = "recipe.yaml", "recipe-begun.yaml"  # the latter only if the run was lengthened since
RESULTS, REPORT, SAMPLES, ENCODER = "results.json", "report.html", "samples.png", "encoder.safetensors"
# What a run may write before its first step is done.
EARLY = (RECIPE, "server*.log", "metrics.jsonl", "metrics.csv", "assignments.jsonl", "tensorboard", "wandb", ".*.part")


class RunDirectory:
    """A run directory that this process has for itself.

    Args:
        path: of the directory.

    Attributes:
        begun: whether a step of the run was taken here, so that there is something to keep.
    """

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

    What a killed process left without a checkpoint and without a row of its log is taken up.

    Args:
        out: the directory.
        resume: whether it may hold a run.

    Raises:
        UserError: if it cannot be made, another process has it, or it holds a run already.
    """
    directory = RunDirectory(out)
    with provisional(out, lambda: directory.begun, EARLY):
        if not resume:
            refuse_used(out)  # another process may have begun one since
        yield directory


def refuse_used(out: Path) -> None:
    """Raises UserError if `out` holds a run already, or is no directory."""
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
