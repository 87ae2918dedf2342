"""Checkpoints: everything that a run needs to go on where it was, to the bit.

What a checkpoint does not hold, because it follows from the recipe and the position alone: the learning rate, the view
plan with its variants and their seeds, and every random stream (`runtime.stream` names each by run seed, epoch and
step; torch's default generators, which dropout draws from, are seeded anew in every step).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from genssl.base.saved_state import DamagedError, read_state, write_state
from genssl.errors import UserError
from genssl.variants.ledger import Ledger

LATEST, BEST, OLDER = "checkpoint.pt", "checkpoint-best.pt", "checkpoint-*.pt"
FORMAT = "genssl-checkpoint/2"
OLDER_FORMATS = ("genssl-checkpoint/1",)  # of which the usage of variants is 12 bytes each, and stays so


@dataclass
class Position:
    """How far a run is.

    Attributes:
        step: optimiser steps done, over all epochs.
        seconds: that the training loop has taken, before this process included.
        best: the best online kNN so far, or None.
        resumed: one entry for every time that the run was resumed; see `resume.entry`.
    """

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    resumed: list[dict[str, Any]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of a run directory: the newest, the ones before it that are to be kept, and the best.

    Args:
        folder: the run directory.
        keep: how many, the newest included and the best not.
        identity: what must be equal between the run that wrote a checkpoint and the one that reads it, by its name.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, str]) -> None:
        self._folder, self._keep, self._identity = folder, keep, identity
        self._newest: int | None = None  # the step of checkpoint.pt, as far as this process knows

    def save(
        self,
        position: Position,
        *,
        epoch: int,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        ledger: Ledger,
        is_best: bool = False,
        due: bool = True,
    ) -> None:
        """Writes the state after `position.step` steps; `torch.load(weights_only=True)` reads it.

        Args:
            position: how far the run is.
            epoch: whole epochs done.
            method: with its moving averages and queues.
            optimizer: with its moments.
            scaler: of fp16, if there is one.
            ledger: with the usage of every variant.
            is_best: the state is the best so far; a copy of it stays.
            due: otherwise only that copy is written.
        """
        counts = ledger.state()
        usage = counts.pop("usage")
        state = {
            "format": FORMAT,
            "identity": self._identity,
            "step": position.step,
            "epoch": epoch,
            "seconds": position.seconds,
            "best": position.best,
            "resumed": position.resumed,
            "method": method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ledger": counts,
            "usage": _as_tensors(usage),
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
        """Adds to the identity what was not known at first, and holds it against a state that was read.

        Raises:
            UserError: if the state has something else.
        """
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


def restore(
    state: dict[str, Any],
    path: Path,
    *,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
) -> Position:
    """Puts a state back into what `Checkpoints.save` was given, the ledger left out; returns the position.

    Raises:
        UserError: if it is the state of another model.
    """
    try:
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
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
        raise DamagedError("it is no checkpoint of this version of genssl")
    return state
