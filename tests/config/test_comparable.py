"""Which settings make a run another run, and which do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from genssl.config.comparable import baseline_of, deciding, differences
from genssl.config.load import load
from genssl.config.recipe import Recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "simclr_sd.yaml"
FAR = "variants.server=one:50051"


def recipe(*overrides: str) -> Recipe:
    return load(Recipe, RECIPE, overrides)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ([], ["train.loggers=[tensorboard]", "train.checkpoint_every_epochs=2", "train.keep_checkpoints=3"]),
        ([], ["variants.deadline_seconds=5"]),
        ([FAR], ["variants.server=unix:/run/other", "variants.token_file=/etc/token"]),
        ([FAR], ["variants.server=[one:1, two:2]"]),
        (["variants.source=in_process"], ["variants.source=in_process", FAR]),
        # Nothing of the variants matters where there are none, however that is said.
        (["variants.source=none"], ["variants.source=none", "variants.late=reuse", "views.policy=both"]),
        (["variants.source=none"], ["views.policy=none", "variants.per_image=3"]),
        (["variants.source=none"], ["views.probability=0", "variants.store=somewhere"]),
    ],
)
def test_the_same_run(before, now):
    assert deciding(recipe(*before)) == deciding(recipe(*now))
    assert differences(deciding(recipe(*before)), deciding(recipe(*now))) == []


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ([], ["variants.source=none"], 'variants.source "online" (now: "none")'),
        ([], ["variants.source=in_process"], 'variants.source "online" (now: "in_process")'),
        (
            ["variants.store=s", "variants.source=stored"],
            ["variants.store=s"],
            'variants.source "stored" (now: "online")',
        ),
        ([], ["variants.per_image=10"], 'variants.per_image "fresh" (now: 10)'),
        ([], ["variants.late=real"], 'variants.late "block" (now: "real")'),
        ([], [FAR], 'variants.server "embedded" (now: "a server")'),
        # How fast a server is decides which variants are late.
        (
            ["variants.late=real", FAR],
            ["variants.late=real", "variants.server=two:1"],
            'variants.server "one:50051" (now: "two:1")',
        ),
        ([], ["train.threads=1"], 'train.threads "auto" (now: 1)'),
        ([], ["train.precision=bf16"], 'train.precision "fp32" (now: "bf16")'),
        ([], ["seed=7"], "seed 0 (now: 7)"),
        ([], ["generator.noise_level=3"], "generator.noise_level"),
        (["variants.source=none"], ["variants.source=none", "optimizer.lr=1"], "optimizer.lr"),
    ],
)
def test_another_run(before, now, said):
    found = differences(deciding(recipe(*before)), deciding(recipe(*now)))
    assert any(line.startswith(said) for line in found), found


def test_runs_with_variants_share_a_baseline():
    none = baseline_of(recipe("variants.source=none"))
    for overrides in (
        [],
        ["variants.source=stored", "variants.store=s", "variants.per_image=3"],
        ["views.policy=both", "views.probability=0.5"],
        ["generator.noise_level=3"],
        ["name=other"],
    ):
        assert baseline_of(recipe(*overrides)) == none
    for override in ("seed=1", "train.epochs=7", "views.augmentation.preset=crop_only"):
        assert baseline_of(recipe(override)) != none
