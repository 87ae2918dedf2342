"""Summaries of runs: grouped by recipe, compared seed by seed with the runs without variants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genssl.config.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.config.summary import mean_and_interval, summarise_runs
from genssl.errors import UserError

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "simclr_sd.yaml"


def write_run(folder: Path, value: float, *overrides: str) -> None:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(load(Recipe, RECIPE, overrides)))
    (folder / "results.json").write_text(json.dumps({"metrics": {"knn/top1": value}, "seconds": 10.0}))


def test_runs_are_grouped_by_everything_but_the_seed_and_paired_with_their_baseline(tmp_path):
    for seed, (online, none) in enumerate([(0.9, 0.8), (0.7, 0.65)]):
        write_run(tmp_path / f"online-{seed}", online, f"seed={seed}")
        write_run(tmp_path / f"none-{seed}", none, f"seed={seed}", "variants.source=none")
    write_run(tmp_path / "none-9", 0.1, "seed=9", "variants.source=none")
    write_run(tmp_path / "longer", 0.5, "train.epochs=50")
    groups = {(group.source, len(group.seeds)): group for group in summarise_runs(tmp_path)}
    assert set(groups) == {("online", 2), ("none", 3), ("online", 1)}
    assert groups["online", 2].metrics == {"knn/top1": [0.9, 0.7]}
    assert groups["online", 2].differences("knn/top1") == pytest.approx([0.1, 0.05])
    assert groups["online", 1].baseline is None, "another number of epochs is another recipe"
    assert groups["none", 3].baseline is None


def test_the_interval_is_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_a_folder_without_runs_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        summarise_runs(tmp_path)
