"""report.html of a run: the same unit everywhere, each protocol once, whole epochs, and the baseline beside it."""

from __future__ import annotations

import json
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from short_runs import RECIPE

from genssl.config.documents.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.training import report
from genssl.training.report import LIGHT, draw_loss, find_baseline, write_report
from genssl.variants.ledger import Ledger

METRICS = {
    "few_shot/top1@5": 0.70264,
    "few_shot/top1@5_std": 0.02733,
    "few_shot/top1@5_low": 0.66626,
    "few_shot/top1@5_high": 0.73663,
    "rankme/effective_rank": 320.456,
    "alignment_uniformity/uniformity_real": -0.72788,
}
PROTOCOL = {
    "few_shot": {"labels_per_class": 5, "penalties": [0.1, 1.0]},
    "rankme": {"images": 100},
    "alignment_uniformity": {"accuracies": {"fog": [0.5, 0.25]}},
}


def write_run(
    out: Path, *overrides: str, epochs: int = 3, shift: float = 0.0, digest: str = "d"
) -> tuple[Recipe, dict[str, Any]]:
    recipe = load(Recipe, RECIPE, overrides)
    out.mkdir(parents=True)
    variants = (
        {"source": recipe.variants.source, "model": "builtin:m"} if recipe.uses_variants() else {"source": "none"}
    )
    results = {
        "name": recipe.name,
        "metrics": {name: value + shift for name, value in METRICS.items()},
        "ledger": Ledger(trainer_seconds=2.5, prefetch_depth=8).summary(),
        "protocol": PROTOCOL,
        "provenance": {"dataset": {"name": "digits", "images": 1437, "digest": digest}, "variants": variants},
        "seconds": 9.0,
    }
    (out / "recipe.yaml").write_text(to_yaml(recipe))
    (out / "results.json").write_text(json.dumps(results))
    rows = [{"epoch": number, "loss": 5 / number} for number in range(1, epochs + 1)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (8, 8)).save(out / "samples.png")
    return recipe, results


def page_of(out: Path, recipe: Recipe, results: dict[str, Any]) -> str:
    """Returns the words of the page, in one line."""
    write_report(out, recipe, results)
    html = re.sub(r"<style>.*?</style>|<wbr>", "", (out / "report.html").read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_a_number_has_one_unit_and_a_protocol_stands_once(tmp_path):
    page = page_of(tmp_path / "run", *write_run(tmp_path / "run"))
    assert page.count("70.26 %") == 2, "in a tile and in the table"
    assert "0.7026" not in page
    assert "66.63 to 73.66 %, std 2.73 %" in page
    assert page.count("320.5") == page.count("-0.7279") == 2
    assert "lower is better" in page
    assert page.count("labels per class: 5; penalties: 0.1, 1.0") == 1
    assert "accuracies fog: 0.5, 0.25" in page, "a table of its own, in no line"
    assert "planned variants that arrived as planned" in page
    assert "without variants" not in page
    assert page_of(tmp_path / "one", *write_run(tmp_path / "one", epochs=1)).count("1 epoch of digits") == 1


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 200])
def test_epochs_on_the_axis_are_whole(epochs):
    figure = draw_loss([{"epoch": number, "loss": 1.0 / number} for number in range(1, epochs + 1)], None, LIGHT)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    ticks = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)


def test_the_baseline_stands_beside_the_run(tmp_path):
    write_run(tmp_path / "none", "variants.source=none", "variants.late=reuse", shift=-0.05)
    page = page_of(tmp_path / "run", *write_run(tmp_path / "run"))
    assert "few_shot/top1@5 70.26 % 66.63 to 73.66 %, std 2.73 % 65.26 % +5.00 points" in page
    assert "rankme/effective_rank 320.5 320.4 +0.05" in page
    assert "the run of the same recipe and seed in ../none" in page
    assert "this run and of that without" not in page_of(tmp_path / "alone" / "x", *write_run(tmp_path / "alone" / "x"))
    recipe, results = write_run(tmp_path / "other", "variants.source=none", "seed=9")
    assert find_baseline(tmp_path / "other", recipe, results) is None, "it is one itself"


@pytest.mark.parametrize(
    "other",
    [
        {"overrides": ["variants.source=none", "seed=1"]},
        {"overrides": ["variants.source=none", "train.epochs=7"]},
        {"overrides": ["variants.source=none"], "digest": "of other images"},
        {"overrides": ["variants.source=in_process"]},
    ],
)
def test_another_run_is_no_baseline(tmp_path, other):
    write_run(tmp_path / "other", *other["overrides"], digest=other.get("digest", "d"))
    recipe, results = write_run(tmp_path / "run")
    assert find_baseline(tmp_path / "run", recipe, results) is None


def test_the_latest_baseline_is_taken_and_what_cannot_be_read_is_none(tmp_path, monkeypatch):
    for age, name in enumerate(("a", "c", "b")):
        write_run(tmp_path / name, "variants.source=none")
        os.utime(tmp_path / name / "results.json", (1000 + age, 1000 + age))
    for name, file in (("broken", "results.json"), ("cut", "recipe.yaml"), ("unlogged", "metrics.jsonl")):
        write_run(tmp_path / name, "variants.source=none")
        (tmp_path / name / file).write_text('{"half')
    recipe, results = write_run(tmp_path / "run")
    found = find_baseline(tmp_path / "run", recipe, results)
    assert found is not None
    assert found.name == "../b"
    monkeypatch.setattr(report, "MOST_LOOKED_AT", 0)
    assert find_baseline(tmp_path / "run", recipe, results) is None


def test_in_a_study_it_is_the_arm_without_variants_at_the_same_seed(tmp_path):
    (tmp_path / "study.yaml").touch()
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "none" / f"seed-{seed}", "variants.source=none", f"seed={seed}")
    recipe, results = write_run(tmp_path / "runs" / "online" / "seed-1", "seed=1", "views.policy=both")
    found = find_baseline(tmp_path / "runs" / "online" / "seed-1", recipe, results)
    assert found is not None
    assert found.name == "../../none/seed-1"
