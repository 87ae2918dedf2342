"""Checkpoints: everything that a run needs to go on where it was, to the bit.

What a checkpoint does not hold, because it follows from the recipe and the position alone: the learning rate, the view
plan with its variants and their seeds, and every random stream (`devices.stream` names each by run seed, epoch and
step; torch's default generators, which dropout draws from, are seeded anew in every step).
"""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from genssl.base.ranks import Ranks
from genssl.base.saved_state import DamagedError, read_state, write_state
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.data.load import dataset_digest
from genssl.errors import UserError
from genssl.variants.ledger import Ledger

LATEST, BEST, OLDER = "checkpoint.pt", "checkpoint-best.pt", "checkpoint-*.pt"
FORMAT = "genssl-checkpoint/2"
OLDER_FORMATS = ("genssl-checkpoint/1",)  # of which the usage of variants is 12 bytes each, and stays so


@dataclass
class Position:
    """How far a run is."""

    step: int = 0  # optimiser steps done, over all epochs
    seconds: float = 0.0  # that the training loop has taken, before this process included
    best: float | None = None  # online kNN so far
    resumed: list[dict[str, Any]] = field(default_factory=list)  # one `resumption` for every time


class Trained(NamedTuple):
    """What training changes: the method with its averages and queues, the optimiser's moments, the scaler of fp16."""

    method: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None


class RunCheckpoints:
    """The checkpoints of a run directory: the newest, the ones before it that are to be kept, and the best.

    Args:
        folder: the run directory.
        keep: how many, the newest included and the best not.
        identity: what must be equal between the run that wrote a checkpoint and the one that reads it, by name.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, str]) -> None:
        self._folder, self._keep, self._identity = folder, keep, identity
        self._newest: int | None = None  # the step of checkpoint.pt, as far as this process knows

    def save(
        self,
        position: Position,
        trained: Trained,
        ledger: Ledger,
        *,
        epoch: int,
        is_best: bool = False,
        due: bool = True,
    ) -> None:
        """Writes the state after `position.step` steps; `torch.load(weights_only=True)` reads it.

        Of the best state so far a copy stays; if no checkpoint is `due`, only that copy is written.
        """
        counts = ledger.state()
        usage = _as_tensors(counts.pop("usage"))
        state = {
            "format": FORMAT,
            "identity": self._identity,
            "step": position.step,
            "epoch": epoch,
            "seconds": position.seconds,
            "best": position.best,
            "resumed": position.resumed,
            **{name: None if part is None else part.state_dict() for name, part in trained._asdict().items()},
            "ledger": counts,
            "usage": usage,
        }
        if due:
            if self._newest is not None and self._keep > 1 and self._newest != position.step:
                latest = self._folder / LATEST
                if latest.exists():
                    os.replace(latest, self._folder / OLDER.replace("*", str(self._newest)))
            _write(self._folder / LATEST, state)
            self._newest = position.step
            for path in self._older()[self._keep - 1 :]:
                path.unlink(missing_ok=True)
        if is_best:
            _write(self._folder / BEST, state)

    def identify(self, state: dict[str, Any] | None, **more: str) -> None:
        """Adds to the identity what was not known at first; raises UserError if a state that was read has another."""
        self._identity |= more
        if state is not None:
            self._check(self._folder / LATEST, state["identity"])

    def latest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """Returns the newest state that can be read, or None if there is no checkpoint, and what the user should know.

        Raises:
            UserError: if none of those that are there can be read, or one is of something else than this run.
        """
        notes: list[str] = []
        for path in [self._folder / LATEST, *self._older(), self._folder / BEST]:
            if not path.exists():
                continue
            try:
                state = _read(path)
            except DamagedError as error:
                notes.append(f"{path} is damaged ({error})")
                continue
            self._check(path, state["identity"])
            if notes:
                notes.append(f"going back to {path.name}, after step {state['step']}")
            self._newest = state["step"] if path.name == LATEST else None
            return state, notes
        if notes:
            raise UserError(
                f"{'; '.join(notes)}, and there is no other checkpoint; restore the file, or remove it to begin this "
                "run again from its first step"
            )
        return None, []

    def _older(self) -> list[Path]:
        """Returns the numbered checkpoints, the newest first."""
        found = [path for path in self._folder.glob(OLDER) if path.stem.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]), reverse=True)

    def _check(self, path: Path, identity: dict[str, str]) -> None:
        differing = [name for name, value in self._identity.items() if identity.get(name, "") != value]
        if differing:
            said = ", ".join(
                f"{name} {identity.get(name) or 'none'} (now: {self._identity[name] or 'none'})" for name in differing
            )
            way = ""
            if differing == ["generator"] and identity.get("generator"):
                way = (
                    ". If only genssl is newer, its server takes the former name by "
                    f"known_fingerprints: ['{identity['generator']}'] in its file"
                )
            raise UserError(
                f"{path} is the checkpoint of another run: {said}. A run goes on only with the recipe, data and "
                f"generator that it was begun with; restore those, or start another run with --out{way}"
            )


def restore(state: dict[str, Any], path: Path, trained: Trained) -> Position:
    """Puts a state back into what `RunCheckpoints.save` was given, the ledger left out; returns the position.

    Raises:
        UserError: if it is the state of another model.
    """
    try:
        for name, part in trained._asdict().items():
            if part is not None:
                part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds the weights of another model ({str(error).splitlines()[0]}); it was written by another "
            "version of genssl: resume it with that one, or start another run with --out"
        ) from None
    return Position(state["step"], state["seconds"], state["best"], list(state["resumed"]))


def restore_ledger(state: dict[str, Any], ledger: Ledger) -> None:
    """Puts the counts back, before any source adds to them."""
    usage = state["usage"]
    if isinstance(usage, dict):
        usage = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in usage.items()}
    else:
        names, stood_in = usage
        usage = names.numpy().view("uint64"), stood_in.numpy().view("uint32")
    ledger.restore(state["ledger"] | {"usage": usage})


# ---- What a run that goes on must have in common with the one before ----
def identity(recipe: bytes, dataset: ImageDataset) -> dict[str, str]:
    """Returns what a checkpoint and the run that goes on from it must agree on, the generator left out.

    The recipe is as it was written when the run was begun, so that settings which have come up since change nothing.
    """
    digest = hashlib.blake2b(recipe, digest_size=16).hexdigest()
    return {"recipe": digest, "dataset": dataset_digest(dataset)}


def require_same_step(ranks: Ranks, folder: Path, step: int) -> None:
    """Raises UserError on every rank if their checkpoints are of different steps: machines without a shared folder.

    `step` is of the checkpoint that this rank goes on from; 0 if it found none.
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


def resumption(recipe: Recipe, device: torch.device, step: int) -> dict[str, Any]:
    """Returns what results.json says of one resumption: at which step, and whether it is exact."""
    reason = _why_inexact(recipe, device)
    if reason is None:
        return {"step": step, "exact": True}
    return {"step": step, "exact": False, "because": reason}


def _why_inexact(recipe: Recipe, device: torch.device) -> str | None:
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


# ---- Files ----
def _as_tensors(usage: Any) -> Any:
    if isinstance(usage, dict):
        return {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in usage.items()}
    # torch has no unsigned integers that it stores everywhere; the bits are the same.
    names, stood_in = usage
    return [torch.from_numpy(names.view("int64")), torch.from_numpy(stood_in.view("int32"))]


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        write_state(path, state)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"{path} cannot be written ({str(error).splitlines()[0]}); the checkpoint before it is whole. Make room, "
            "then continue with genssl run --resume"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    state = read_state(path)
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, *OLDER_FORMATS):
        raise DamagedError("it is not a checkpoint of this version of genssl")
    return state
