"""Runs that have not finished, read from their directories; imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from genssl.base.files import is_claimed
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError


@dataclass
class Unfinished:
    """A run that is under way, or was interrupted.

    Attributes:
        folder: its directory.
        name: of its recipe.
        seed: of its recipe.
        epochs_done: that its log has.
        epochs: of its recipe.
        running: whether a process has it now.
        resumable: whether it has a checkpoint to go on from; otherwise it would begin again.
    """

    folder: Path
    name: str
    seed: int
    epochs_done: int
    epochs: int
    running: bool
    resumable: bool

    @property
    def state(self) -> str:
        """Says what to do about it."""
        if self.running:
            return "running"
        if self.resumable:
            return f"interrupted; continue with: genssl run --resume {self.folder}"
        return f"interrupted before its first checkpoint; begin again with: genssl run --resume {self.folder}"


def unfinished_runs(folder: Path) -> list[Unfinished]:
    """Reads every run directly below a folder that has no results."""
    found = []
    for path in sorted(folder.glob("*/recipe.yaml")):
        if (path.parent / "results.json").exists():
            continue
        try:
            recipe = load(Recipe, path)
        except UserError:  # of another version of genssl, or no run at all
            continue
        found.append(
            Unfinished(
                folder=path.parent,
                name=recipe.name,
                seed=recipe.seed,
                epochs_done=_epochs_of(path.parent / "metrics.jsonl"),
                epochs=recipe.train.epochs,
                running=is_claimed(path.parent),
                resumable=any(path.parent.glob("checkpoint*.pt")),
            )
        )
    return found


def _epochs_of(path: Path) -> int:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["epoch"])
        except (ValueError, KeyError, TypeError):  # the last line of a run that was killed may be half a line
            continue
    return 0
