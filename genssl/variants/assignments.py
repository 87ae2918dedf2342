"""assignments.jsonl: which variant every slot of a run got, so that a run with late variants can be repeated exactly.

The first line says what plan the log belongs to. Every further line is one step: its number, one letter an origin
(g generated, s store, u reused, r real) and the index delivered (-1 for the real image), for each slot that the plan
wanted to be a variant, row by row, first view before second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from genssl.errors import UserError
from genssl.variants.ledger import Origin
from genssl.variants.plan import REAL, StepPlan, ViewPlan
from genssl.variants.source import Delivery

FORMAT = "genssl-assignments/1"
LETTERS: dict[Origin, str] = {"generated": "g", "store": "s", "reused": "u", "real": "r"}
ORIGINS: dict[str, Origin] = {letter: origin for origin, letter in LETTERS.items()}


class AssignmentLog:
    """Writes the log, a line a step.

    Args:
        path: of the file; replaced.
        header: what the plan depends on, such as the data set's digest and the seed.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._file = path.open("w")
        self._file.write(json.dumps({"format": FORMAT, **header}) + "\n")

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

    Args:
        plan: of this run, without the log.
        path: of the log.
        header: of this run; the log must have the same.
        steps: how many steps this run has; the log must have as many.

    Raises:
        UserError: if the file is no log, belongs to another plan, or ends too early.
    """

    def __init__(self, plan: ViewPlan, path: Path, header: Mapping[str, Any], steps: int) -> None:
        self._plan, self._path = plan, path
        self.steps_per_epoch = plan.steps_per_epoch
        lines = _read(path)
        logged = lines[0]
        differing = [name for name, value in header.items() if logged.get(name) != value]
        if differing:
            said = ", ".join(f"{name} {logged.get(name)!r} (this recipe: {header[name]!r})" for name in differing)
            raise UserError(
                f"variants.replay: {path} is the log of another plan: {said}. A log can be replayed only by the recipe "
                "that it was written under; make them agree, or remove variants.replay"
            )
        self._rows: dict[int, npt.NDArray[np.int64]] = {}
        self._steps = {line["step"]: (line["origins"], tuple(line["indices"])) for line in lines[1:]}
        if (missing := next((step for step in range(steps) if step not in self._steps), None)) is not None:
            raise UserError(
                f"variants.replay: {path} ends before step {missing}, but this recipe has {steps} steps; "
                "lower train.epochs to what the log covers, or replay the log of a run that was not cut short"
            )

    def step(self, epoch: int, step: int) -> StepPlan:
        """Returns the plan's batch with the logged index in every slot of a variant; REAL where that got the image.

        Raises:
            UserError: if the log has another number of slots in this step.
        """
        planned = self._plan.step(epoch, step)
        _, logged = self._steps[epoch * self.steps_per_epoch + step]
        slots = planned.indices != REAL
        if slots.sum() != len(logged):
            raise UserError(
                f"variants.replay: {self._path}: step {epoch * self.steps_per_epoch + step} has {len(logged)} variants "
                f"and this recipe wants {slots.sum()} there; the log is damaged, or of another version of genssl"
            )
        self._rows[epoch * self.steps_per_epoch + step] = slots.nonzero()[0]
        indices = planned.indices.copy()
        indices[slots] = np.array(logged, np.int64)
        return StepPlan(epoch=epoch, step=step, rows=planned.rows, indices=indices)

    def slots(self, step: int) -> npt.NDArray[np.int64]:
        """Returns int64 [N], the batch's row of every slot that the plan wanted to be a variant; once a step."""
        return self._rows.pop(step)

    def relabelled(self, step: int, delivery: Delivery | None) -> tuple[list[Origin], list[int]]:
        """Returns origins and indices of all slots of a step that the log has, for the ledger.

        Slots that were reused or real are so again, though their variants have now been made for the purpose.

        Args:
            step: number of the step within the run.
            delivery: of the slots that are variants in the log.
        """
        letters, indices = self._steps[step]
        made = iter(delivery.origins if delivery is not None else [])
        origins: list[Origin] = []
        for letter in letters:
            logged = ORIGINS[letter]
            delivered: Origin = "real" if logged == "real" else next(made)
            origins.append(logged if logged in ("reused", "real") else delivered)
        return origins, list(indices)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f"variants.replay: {path} cannot be read ({reason}); give the assignments.jsonl of a run directory"
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            wanted = {"format"} if number == 1 else {"step", "origins", "indices"}
            if not isinstance(content, dict) or not wanted <= content.keys():
                raise ValueError
            if number == 1 and content["format"] != FORMAT:
                raise ValueError
            if number > 1 and (
                len(content["origins"]) != len(content["indices"]) or set(content["origins"]) - set(ORIGINS)
            ):
                raise ValueError
        except ValueError:
            if number == len(lines) > 1:  # a run that was killed may leave half a line
                break
            raise UserError(
                f"variants.replay: {path}:{number} is no line of an assignment log ({FORMAT}); "
                "give the assignments.jsonl of a run directory"
            ) from None
        found.append(content)
    if not found:
        raise UserError(f"variants.replay: {path} is empty; give the assignments.jsonl of a run directory")
    return found
