"""The finished run without variants that lies beside a run and differs from it in nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from genssl.config.comparable import baseline_of
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError

MOST_LOOKED_AT = 1000  # directories, so that a folder of many runs does not hold up a report


@dataclass(frozen=True)
class Baseline:
    """A run without variants.

    Attributes:
        folder: its directory.
        name: of that directory as the other run's reader knows it, such as "../none".
        results: of its results.json.
        epochs: the rows of its metrics.jsonl.
    """

    folder: Path
    name: str
    results: dict[str, Any]
    epochs: list[dict[str, Any]]


def find_baseline(out: Path, recipe: Recipe, results: dict[str, Any]) -> Baseline | None:
    """Returns the baseline of a run, the latest if there are several; None if there is none, or it is one itself.

    Args:
        out: the directory of the run; looked at are those beside it, and in a study the runs of other arms at its seed.
        recipe: of the run.
        results: of the run; a baseline has the same data.
    """
    if not recipe.uses_variants():
        return None
    asked, out = baseline_of(recipe), out.resolve()
    found = [one for folder in _beside(out) if (one := _read(folder, out, asked, results)) is not None]
    return max(found, key=lambda one: (one.folder / "results.json").stat().st_mtime_ns, default=None)


def _beside(out: Path) -> Iterator[Path]:
    """Yields finished runs that may be the baseline of that in `out`."""
    runs = out.parent.parent
    in_study = runs.name == "runs" and (runs.parent / "study.yaml").is_file()
    folders = (arm / out.name for arm in runs.iterdir()) if in_study else out.parent.iterdir()
    for folder in islice(folders, MOST_LOOKED_AT):
        if folder != out and (folder / "results.json").is_file():
            yield folder


def _read(folder: Path, out: Path, asked: dict[str, Any], ours: dict[str, Any]) -> Baseline | None:
    """Returns what a directory holds if it is the baseline that is asked for; what cannot be read is none."""
    try:
        results = json.loads((folder / "results.json").read_text())
        of, data = results["provenance"]["variants"]["source"], results["provenance"]["dataset"]
        # Cheaper to know than the recipe, which has to be validated.
        if of != "none" or data["digest"] != ours["provenance"]["dataset"]["digest"]:
            return None
        recipe = load(Recipe, folder / "recipe.yaml")
        if recipe.uses_variants() or baseline_of(recipe) != asked:
            return None
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        name = f"../{folder.name}" if folder.parent == out.parent else f"../../{folder.parent.name}/{folder.name}"
        return Baseline(folder, name, results, epochs)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
