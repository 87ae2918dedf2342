"""assignments.jsonl: which variant every slot of a run got, so that a run with late variants can be repeated exactly.

The first line says what plan the log belongs to. Every further line is one step: its number, one letter an origin
(g generated, s store, u reused, r real) and the index delivered (-1 for the real image), for each slot that the plan
wanted to be a variant, row by row, first column before second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from genssl.base.wording import counted
from genssl.errors import UserError
from genssl.variants.ledger import Origin
from genssl.variants.plan import StepPlan, ViewPlan
from genssl.variants.source import REAL, Delivery

FORMAT = "genssl-assignments/1"
LETTERS: dict[Origin, str] = {"generated": "g", "store": "s", "reused": "u", "real": "r"}
ORIGINS: dict[str, Origin] = {letter: origin for origin, letter in LETTERS.items()}


class AssignmentLog:
    """Writes the log, a line a step, after a header of what the plan depends on.

    Replaces the file, unless a run goes on: then the lines of its `done` steps stay, and what follows them is cut off.
    Raises UserError if the log of such a run lacks some of those steps.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], done: int = 0) -> None:
        if done:
            self._file = path.open("r+")
            self._file.seek(_end_of(path, done))
            self._file.truncate()
            return
        self._file = path.open("w")
        self._file.write(json.dumps({"format": FORMAT, **header}) + "\n")

    def flush(self) -> None:
        """Hands what was written to the system, where it outlives this process."""
        self._file.flush()

    def __enter__(self) -> AssignmentLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, step: int, origins: Sequence[Origin], indices: Sequence[int]) -> None:
        """Enters a step's deliveries, N origins and N indices."""
        letters = "".join(LETTERS[origin] for origin in origins)
        numbers = ",".join(map(str, indices))
        self._file.write(f'{{"step":{step},"origins":"{letters}","indices":[{numbers}]}}\n')


class Replay:
    """A view plan whose variants are those that an earlier run of the same plan got.

    The log is read once to check it, and again a step at a time: parsed, that of a long run does not fit in memory.
    Raises UserError if the file is not a log, has another header than this run, or ends before its `steps`.
    """

    def __init__(self, plan: ViewPlan, path: Path, header: Mapping[str, Any], steps: int) -> None:
        self._plan, self._path = plan, path
        self.steps_per_epoch = plan.steps_per_epoch
        logged, self._offsets = _read(path, steps)
        differing = [name for name, value in header.items() if logged.get(name) != value]
        if differing:
            said = ", ".join(f"{name} {logged.get(name)!r} (this recipe: {header[name]!r})" for name in differing)
            raise UserError(
                f"variants.replay: {path} is the log of another plan: {said}. A log can be replayed only by the recipe "
                "that it was written under; make them agree, or remove variants.replay"
            )
        self._rows: dict[int, npt.NDArray[np.int64]] = {}
        if (missing := np.flatnonzero(self._offsets < 0)).size:
            raise UserError(
                f"variants.replay: {path} ends before step {missing[0]}, but this recipe has {counted(steps, 'step')}; "
                "lower train.epochs to what the log covers, or replay the log of a run that was not cut short"
            )

    def step(self, epoch: int, step: int) -> StepPlan:
        """Returns the plan's batch with the logged index in every slot of a variant; REAL where that got the image.

        Raises UserError if the log has another number of slots in this step.
        """
        planned = self._plan.step(epoch, step)
        _, logged = self._logged(epoch * self.steps_per_epoch + step)
        slots = planned.indices != REAL
        if slots.sum() != len(logged):
            raise UserError(
                f"variants.replay: {self._path}: step {epoch * self.steps_per_epoch + step} has {len(logged)} variants "
                f"and this recipe wants {slots.sum()} there; the log is damaged, or of another version of genssl"
            )
        self._rows[epoch * self.steps_per_epoch + step] = slots.nonzero()[0]
        indices = planned.indices.copy()
        indices[slots] = np.array(logged, np.int64)
        return replace(planned, indices=indices)

    def slots(self, step: int) -> npt.NDArray[np.int64]:
        """Returns int64 [N], the batch's row of every slot that the plan wanted to be a variant; once a step."""
        return self._rows.pop(step)

    def relabelled(self, step: int, delivery: Delivery | None) -> tuple[list[Origin], list[int]]:
        """Returns origins and indices of all slots of a step that the log has, for the ledger.

        Slots that were reused or real are so again, though their variants, in `delivery`, were now made for the
        purpose.
        """
        letters, indices = self._logged(step)
        made = iter(delivery.origins if delivery is not None else [])
        origins: list[Origin] = []
        for letter in letters:
            logged = ORIGINS[letter]
            delivered: Origin = "real" if logged == "real" else next(made)
            origins.append(logged if logged in ("reused", "real") else delivered)
        return origins, indices

    def _logged(self, step: int) -> tuple[str, list[int]]:
        """Reads a step's letters and indices from the file."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offsets[step])
                entry = _entry(file.readline())
            if entry["step"] != step:
                raise ValueError
        except (OSError, ValueError):
            raise UserError(
                f"variants.replay: {self._path} has changed since the run began, at step {step}; "
                "leave it alone until the run is done"
            ) from None
        return entry["origins"], entry["indices"]


def _end_of(path: Path, steps: int) -> int:
    """Returns where in the file the line of the last of `steps` steps ends."""
    end = 0
    try:
        with path.open("rb") as file:
            for number in range(steps + 1):  # the first line is the header
                line = file.readline()
                if not line.endswith(b"\n") or (number and _entry(line)["step"] != number - 1):
                    raise ValueError
                end += len(line)
    except (OSError, ValueError):
        raise UserError(
            f"{path} does not have the {steps} steps that this run has done, so the run cannot go on; restore the "
            "file, or start another run"
        ) from None
    return end


def _read(path: Path, steps: int) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Checks every line of a log.

    Returns:
        The first line, and int64 [steps], where in the file each step's line begins; -1 for a step that has none.
    """
    offsets = np.full(steps, -1, np.int64)
    header: dict[str, Any] | None = None
    try:
        with path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, start=1):
                try:
                    if number == 1:
                        header = _header(line)
                    elif (step := _entry(line)["step"]) < steps:
                        offsets[step] = start
                except UnicodeDecodeError:
                    raise
                except ValueError:
                    if number > 1 and not file.readline():  # a run that was killed may leave half a line
                        break
                    raise UserError(
                        f"variants.replay: {path}:{number} is not a line of an assignment log ({FORMAT}); "
                        "give the assignments.jsonl of a run directory"
                    ) from None
                start += len(line)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"variants.replay: {path} cannot be read ({reason}); give the assignments.jsonl of a run directory"
        ) from None
    if header is None:
        raise UserError(f"variants.replay: {path} is empty; give the assignments.jsonl of a run directory")
    return header, offsets


def _header(line: bytes) -> dict[str, Any]:
    content = json.loads(line.decode())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError
    return content


def _entry(line: bytes) -> dict[str, Any]:
    """Parses a step's line; raises ValueError if it is none."""
    content = json.loads(line.decode())
    if not isinstance(content, dict) or not {"step", "origins", "indices"} <= content.keys():
        raise ValueError
    step, origins, indices = content["step"], content["origins"], content["indices"]
    if type(step) is not int or step < 0 or not isinstance(origins, str) or set(origins) - set(ORIGINS):
        raise ValueError
    if not isinstance(indices, list) or len(indices) != len(origins) or any(type(one) is not int for one in indices):
        raise ValueError
    return content
