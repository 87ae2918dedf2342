"""Trainings of the recipe of the digits, cut down to seconds, and what a person reads of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from genssl.config.recipe import Recipe
from genssl.training.progress import RunProgress
from genssl.training.run import run

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "simclr_sd.yaml"
SHORT = ["train.epochs=1", "schedule.warmup_epochs=0", "backbone.width=4", "train.threads=1"]


def run_and_read(recipe: Recipe, out: Path, *, resume: bool = False) -> tuple[dict[str, Any], str]:
    """Runs a recipe; returns its results and what the user reads."""
    text = io.StringIO()
    with RunProgress(Console(file=text, width=400)) as progress:
        return run(recipe, out, progress, resume=resume), text.getvalue()


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures and the page, which take longer than these trainings."""
    patch.setattr("genssl.training.run.draw_run_samples", lambda path, *rest: path.touch())
    patch.setattr("genssl.training.run.write_report", lambda out, *rest: (out / "report.html").touch())
