"""Where the numbers of an epoch go: metrics.jsonl and metrics.csv always, other loggers where the recipe names them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

from genssl.base.files import write_atomically
from genssl.config.recipe import Recipe
from genssl.errors import UserError

Row = dict[str, Any]


class Logger(Protocol):
    """Takes the numbers of an epoch somewhere."""

    def log(self, row: Row, step: int) -> None:
        """Takes the numbers after `step` steps; a resumed run may log a step a second time."""

    def close(self) -> None:
        """Ends in order."""


class MetricsLog:
    """Writes metrics.jsonl and metrics.csv, and passes every row on; `rows` are those of the whole run.

    Args:
        out: the run directory; None for a rank that does not write.
        loggers: get the rows too.
        done: steps done by a run that goes on; rows of later steps are cut off.
    """

    def __init__(self, out: Path | None, loggers: list[Logger], done: int = 0) -> None:
        self._loggers = loggers
        self.rows: list[Row] = []
        self._file: TextIO | None = None
        if out is None:
            return
        path, self._csv = out / "metrics.jsonl", out / "metrics.csv"
        if done:
            cut_back(path, done)
            self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._file = path.open("a" if done else "w")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for logger in self._loggers:
            logger.close()

    def write(self, row: Row) -> None:
        """Enters an epoch; `row["step"]` is the number of steps done."""
        assert self._file is not None
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        # Whole, since the last row may have columns that the first had not.
        write_atomically(self._csv, lambda partial: partial.write_text(as_csv(self.rows)))
        for logger in self._loggers:
            logger.log({name: value for name, value in row.items() if name != "step"}, row["step"])


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


def as_csv(rows: list[Row]) -> str:
    """Returns the rows as CSV with every column that one of them has; what a row has not is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


class TensorBoardLogger:
    """Event files in the run directory's folder `tensorboard`."""

    def __init__(self, recipe: Recipe, out: Path, *, resumed: bool) -> None:
        self._writer = _require("tensorboard").SummaryWriter(str(out / "tensorboard"))

    def log(self, row: Row, step: int) -> None:
        """Adds a scalar for every number."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class TrackerLogger:
    """Weights & Biases, or trackio, which has the same functions.

    The recipe's name is the project's, the directory's name the run's; a run that goes on continues its record.
    """

    def __init__(self, package: str, recipe: Recipe, out: Path, *, resumed: bool) -> None:
        self._tracker = _require(package)
        place: dict[str, Any] = {"resume": "allow"}
        if package == "wandb":
            digest = hashlib.blake2b(str(out.resolve()).encode(), digest_size=8).hexdigest()
            place = {"id": digest, "resume": "allow" if resumed else None, "dir": str(out)}
        self._tracker.init(project=recipe.name, name=out.name, config=recipe.model_dump(mode="json"), **place)

    def log(self, row: Row, step: int) -> None:
        """Logs every number."""
        self._tracker.log(row, step=step)

    def close(self) -> None:
        """Hands over what is left."""
        self._tracker.finish()


LOGGERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": partial(TrackerLogger, "wandb"),
    "trackio": partial(TrackerLogger, "trackio"),
}


def check_loggers(recipe: Recipe) -> None:
    """Raises UserError if the package of a logger is not installed; better before the run directory is made."""
    for name in recipe.train.loggers:
        _require(name)


def open_loggers(recipe: Recipe, out: Path, *, resumed: bool) -> list[Logger]:
    """Returns the loggers that the recipe names beside the files."""
    return [LOGGERS[name](recipe, out, resumed=resumed) for name in recipe.train.loggers]


def _require(name: str) -> ModuleType:
    module, package = ("torch.utils.tensorboard", f"genssl[{name}]") if name == "tensorboard" else (name, name)
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"train.loggers: {name} is not installed ({error}); pip install '{package}', or take it out of the list: "
            "metrics.jsonl and metrics.csv are written anyway"
        ) from None
