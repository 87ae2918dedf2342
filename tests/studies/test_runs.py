"""Summaries of runs: grouped by recipe, compared seed by seed with the runs without variants."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from short_runs import RECIPE

from genssl.cli.tables import repeats
from genssl.config.documents.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.studies.runs import estimate, mean_and_interval, paired_difference, summarise_runs


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


def test_a_repeat_of_a_recipe_and_seed_is_no_further_replicate(tmp_path):
    """Two runs of one seed say no more about other seeds than one, and least of all that there is no spread."""
    for name, value, *overrides in (
        ("b-first", 0.8, "seed=3"),
        ("a-last", 0.9, "seed=3", "train.keep_checkpoints=2"),
        ("other", 0.7, "seed=4"),
        ("none", 0.6, "seed=3", "variants.source=none"),
        ("none-again", 0.6, "seed=3", "variants.source=none", "views.policy=both"),
    ):
        write_run(tmp_path / name, value, *overrides)
    for age, name in enumerate(("none-again", "none", "other", "a-last", "b-first")):
        os.utime(tmp_path / name / "results.json", (1000 + age, 1000 + age))
    online, none = sorted(summarise_runs(tmp_path), key=lambda group: -len(group.seeds))
    assert (online.seeds, online.metrics["knn/top1"]) == ([3, 4], [0.8, 0.7])
    assert (none.seeds, none.metrics["knn/top1"]) == ([3], [0.6])
    assert math.isnan(mean_and_interval(none.metrics["knn/top1"])[1])
    assert online.differences("knn/top1") == pytest.approx([0.2])
    assert online.repeats == {3: (tmp_path / "b-first", [tmp_path / "a-last"])}
    assert repeats([online]) == [
        f"simclr-sd-digits (online), seed 3: {tmp_path / 'b-first'}, which finished last, counts; 1 repeat left out: "
        f"{tmp_path / 'a-last'}"
    ]


def test_a_metric_that_one_run_lacks_is_paired_by_seed(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"none-{seed}", 0.5, f"seed={seed}", "variants.source=none")
        write_run(tmp_path / f"online-{seed}", 0.6 + 0.1 * seed, f"seed={seed}")
    (tmp_path / "online-0" / "results.json").write_text(json.dumps({"metrics": {}, "seconds": 1.0}))
    online = next(group for group in summarise_runs(tmp_path) if group.baseline is not None)
    assert online.differences("knn/top1") == pytest.approx([0.2])


def test_the_interval_is_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-5)


def test_a_folder_without_runs_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        summarise_runs(tmp_path)


# ---- Means over seeds, against numbers from a table of Student's t ----
def test_interval_of_three_values():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.3027, over sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, abs=1e-6)
    assert found.mean - found.low == pytest.approx(4.302653 / 3**0.5, abs=1e-6)


def test_one_value_has_no_interval():
    found = estimate([0.5])
    assert (found.mean, found.low, found.high, found.n) == (0.5, None, None, 1)


def test_pairing_takes_out_what_seeds_share():
    ours, theirs = {0: 0.51, 1: 0.71, 2: 0.92}, {0: 0.50, 1: 0.70, 2: 0.90}
    found = paired_difference(ours, theirs)
    # differences 0.01, 0.01, 0.02: mean 0.013333, standard deviation 0.0057735
    assert found.mean == pytest.approx(0.0133333, abs=1e-6)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.0057735 / 3**0.5, abs=1e-6)
    assert estimate(list(ours.values())).high - estimate(list(ours.values())).mean > 0.5


def test_only_seeds_that_both_have_are_paired():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.5, 2: 9.0}).n == 1
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_equal_arms_have_an_interval_of_nothing():
    found = paired_difference({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)
