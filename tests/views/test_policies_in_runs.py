"""Whole runs under the policies that do not hold one variant a view: what they want, they get, store and repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.training.progress import RunProgress
from genssl.training.run import run
from genssl.training.samples import variant_indices
from genssl.training.supply.steps import view_plan
from genssl.variants.source import REAL

IMAGES = 1437
COMMON = ["train.batch_size=256", "variants.source=in_process"]


def planned(recipe: Recipe) -> np.ndarray:
    plan = view_plan(recipe, IMAGES)
    return np.concatenate([plan.step(0, step).indices for step in range(plan.steps_per_epoch)])


def finished(recipe: Recipe, out: Path) -> dict:
    with (out.parent / f"{out.name}.txt").open("w") as text, RunProgress(Console(file=text)) as progress:
        return run(recipe, out, progress)


@pytest.mark.parametrize(
    ("policy", "per_image", "first"),
    [
        (["views.policy=second"], "fresh", [2**32 + 1, 2**32 + 3, 2**32 + 5]),
        (["views.policy=both"], "fresh", [2**32 + 1, 2**32 + 3, 2**32 + 5]),
        (["views.policy=third", "views.third_count=2"], "fresh", [2**32 + 3, 2**32 + 7, 2**32 + 11]),
        (["views.policy=added"], "fresh", [2**32, 2**32 + 1, 2**32 + 2]),
        (["views.policy=third"], "2", [0, 1]),
    ],
)
def test_samples_show_variants_that_runs_use(quick_recipe, policy, per_image, first):
    recipe = quick_recipe(*policy, f"variants.per_image={per_image}", "seed=1", "views.real_weight=0.001")
    assert variant_indices(recipe, 3) == first
    assert first[0] in planned(recipe)


@pytest.mark.slow
def test_third_views_are_counted_and_replayed(quick_recipe, tmp_path):
    policy = ["views.policy=third", "views.third_count=2", "variants.per_image=3", "views.probability=0.5"]
    logged = ["variants.late=reuse"]  # has no effect in process but for the log
    recipe = quick_recipe(*COMMON, *policy, *logged)
    results = finished(recipe, tmp_path / "first")
    assert results["ledger"]["variants_generated"] == int((planned(recipe) != REAL).sum())
    log = f"variants.replay={tmp_path / 'first' / 'assignments.jsonl'}"
    header = json.loads((tmp_path / "first" / "assignments.jsonl").open().readline())
    assert (header["policy"], header["third_count"]) == ("third", 2)
    finished(quick_recipe(*COMMON, *policy, log), tmp_path / "again")
    first, again = (load_file(tmp_path / name / "encoder.safetensors") for name in ("first", "again"))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    with pytest.raises(UserError, match=r"third_count 2 \(this recipe: 1\)"):
        finished(quick_recipe(*COMMON, *policy, log, "views.third_count=1"), tmp_path / "other")


@pytest.mark.slow
def test_added_asks_once_for_what_both_views_show(quick_recipe, tmp_path):
    recipe = quick_recipe(*COMMON, "views.policy=added", "views.real_weight=2", "variants.per_image=3")
    results = finished(recipe, tmp_path / "run")
    wanted = int((planned(recipe) != REAL).sum())
    assert results["ledger"]["variants_generated"] == wanted
    assert wanted / len(planned(recipe)) == pytest.approx(3 / 5, abs=0.05)
