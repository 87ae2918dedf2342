"""Every shipped study runs to its report, cut as short as it can be; the figures it gives then mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from genssl.cli.training.compare import Watcher
from genssl.config.load import load_study
from genssl.studies.compare import compare

STUDIES = Path(__file__).resolve().parents[2] / "recipes" / "studies"
SHORT = [
    "train.epochs=1",
    "schedule.warmup_epochs=0",
    "train.threads=1",
    "backbone.width=4",
    "variants.per_image=1",
    "evaluate=[{name: few_shot, labels_per_class: 5, draws: 2}]",
]


def test_there_are_studies():
    assert {path.stem for path in STUDIES.glob("*.yaml")} >= {
        "probability_sweep",
        "generators",
        "augmentations",
        "methods",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_study_runs_to_its_report(path, tmp_path):
    loaded = load_study(path, SHORT, seeds=[0])
    out = tmp_path / "out"
    with (tmp_path / "log").open("w") as text:
        summary = compare(loaded, out, Watcher(Console(file=text, width=200), total=len(loaded.arms)))
    assert [arm.name for arm in summary.arms] == [item.arm.name for item in loaded.arms]
    # One store a generator, however many arms read it.
    generators = {str(item.recipe.generator) for item in loaded.arms if item.stored_variants}
    assert len(summary.stores) == len(generators)
    page = (out / "report.html").read_text()
    assert all("arXiv 2403.05966" in page for arm in summary.arms if arm.paper)
    for arm in summary.arms:
        if arm.paper is not None and arm.against:
            theirs = summary.arm(arm.against[0]).paper
            assert arm.paper.differences[arm.against[0]] == pytest.approx(arm.paper.value - theirs.value)
