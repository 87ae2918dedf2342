"""The cost planner: its identities by numbers worked out by hand, and the command as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from genssl.config.documents.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.offline.cost_plan import (
    Setting,
    bytes_per_variant,
    measured_rates,
    plan_costs,
    variant_size,
)

ROOT = Path(__file__).resolve().parents[3]
RECIPE = ROOT / "recipes" / "simclr_sd.yaml"
PAPER = Setting(
    images=1_280_000, epochs=100, views=1, generator_rate=2.4, trainer_rate=305, variants=10, generators=1, size=768
)
# 7200 images, 10 epochs, half a variant a pair: 36,000 slots. 2 variants/s: 5 h for all. 4 images/s: 5 h of training.
SMALL = Setting(images=7200, epochs=10, views=0.5, generator_rate=2, trainer_rate=4, variants=2)


def test_imagenet_as_in_the_paper():
    online, offline, refresh = plan_costs(PAPER)
    # 128e6 / 2.4 / 3600, and 128e6 / 305 / 3600
    assert online.generator_hours == online.wall_hours == pytest.approx(14_814.81, abs=0.01)
    assert PAPER.trainer_hours == pytest.approx(116.576, abs=0.001)
    assert PAPER.generators_to_keep_up == 128  # 305 / 2.4 = 127.08
    # 12.8e6 / 2.4 / 3600; then the training
    assert offline.generator_hours == pytest.approx(1_481.48, abs=0.01)
    assert offline.wall_hours == pytest.approx(1_598.06, abs=0.01)
    assert offline.next_wall_hours == PAPER.trainer_hours
    assert (offline.stored, offline.reuse) == (12_800_000, 10)
    # One generator beside the training: 128e6 * 2.4 / 305 variants
    assert refresh.distinct == pytest.approx(1_007_213, abs=1)
    assert refresh.reuse == pytest.approx(127.08, abs=0.01)
    assert refresh.wall_hours == PAPER.trainer_hours


def test_small_numbers_by_hand():
    online, offline, refresh = plan_costs(SMALL)
    assert SMALL.slots == 36_000
    assert SMALL.trainer_hours == 5
    assert (online.generator_hours, online.wall_hours, online.reuse, online.stored) == (5, 5, 1, 0)
    assert (offline.distinct, offline.generator_hours, offline.wall_hours, offline.reuse) == (14_400, 2, 7, 2.5)
    assert (refresh.distinct, refresh.generator_hours, refresh.wall_hours, refresh.reuse) == (36_000, 5, 5, 1)
    assert SMALL.generators_to_keep_up == 1, "4 images/s and half a variant each is what 2 variants/s give"


def test_two_generators_halve_the_waiting_and_not_the_work():
    online, offline, _ = plan_costs(Setting(**vars(SMALL) | {"generators": 2, "trainer_rate": 40}))
    assert (online.generator_hours, online.wall_hours) == (5, 2.5)
    assert (offline.generator_hours, offline.wall_hours) == (2, 1.5), "an hour by two, and half an hour of training"


@pytest.mark.parametrize(
    ("budget", "hours", "distinct", "reuse"),
    [(1, 1, 7_200, 5), (2.5, 2.5, 18_000, 2), (50, 5, 36_000, 1), (None, 5, 36_000, 1)],
)
def test_a_budget_buys_variants_until_the_training_ends(budget, hours, distinct, reuse):
    refresh = plan_costs(Setting(**vars(SMALL) | {"budget": budget}))[2]
    assert (refresh.generator_hours, refresh.distinct, refresh.reuse, refresh.wall_hours) == (hours, distinct, reuse, 5)


def test_no_more_variants_are_made_than_there_are_slots():
    refresh = plan_costs(Setting(**vars(SMALL) | {"generator_rate": 20}))[2]
    assert (refresh.distinct, refresh.generator_hours, refresh.reuse) == (36_000, 0.5, 1)


def test_bytes_of_a_variant():
    assert bytes_per_variant(224) == pytest.approx({"raw": 150_528, "png": 90_316.8, "jpeg": 25_000})
    assert bytes_per_variant(512)["jpeg"] == pytest.approx(70_000)
    assert bytes_per_variant(1024)["jpeg"] == pytest.approx(4 * 70_000)
    assert bytes_per_variant(112)["jpeg"] == pytest.approx(25_000 / 4)
    assert 35_000 < bytes_per_variant(384)["jpeg"] < 70_000


def test_the_size_comes_from_the_user_the_recipe_or_the_model():
    recipe = load(Recipe, RECIPE)
    assert variant_size(recipe, None) == 8
    assert variant_size(recipe, 96) == 96
    assert variant_size(load(Recipe, RECIPE, ["generator.image_size=64"]), None) == 64
    assert variant_size(load(Recipe, RECIPE, ["generator.image_size=64", "generator.output_size=32"]), None) == 32
    with pytest.raises(UserError, match="give it with --variant-size PIXELS"):
        variant_size(load(Recipe, RECIPE, ["generator.model=owner/name"]), None)


@pytest.mark.parametrize(
    ("policy", "probability", "expected"), [("second", 1, 1), ("both", 0.5, 1), ("both", 1, 2), ("none", 1, 0)]
)
def test_views_of_a_pair(policy, probability, expected):
    recipe = load(Recipe, RECIPE, [f"views.policy={policy}", f"views.probability={probability}"])
    assert recipe.views_per_pair() == expected


def write_run(folder: Path, **changes: float) -> None:
    ledger = {"variants_generated": 900, "variants_refreshed": 100, "generator_seconds": 4.0, "trainer_seconds": 2.0}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"ledger": ledger | changes}))
    (folder / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n')
    (folder / "recipe.yaml").write_text(to_yaml(load(Recipe, RECIPE)))


def test_rates_of_a_run(tmp_path):
    write_run(tmp_path / "run")
    assert measured_rates(tmp_path / "run") == (250, 640), "1000 variants in 4 s; 10 steps of 128 in 2 s"
    # A few views in place of variants that came late, or many of one variant, say nothing about the generator.
    write_run(tmp_path / "late", variants_generated=4, variants_refreshed=0, variants_computed=40)
    assert measured_rates(tmp_path / "late") == (10, 640), "40 variants in 4 s, 4 of which a view got"
    write_run(tmp_path / "stored", variants_generated=0, variants_refreshed=0, generator_seconds=0.0)
    assert measured_rates(tmp_path / "stored") == (None, 640)
    with pytest.raises(UserError, match="is not a finished run"):
        measured_rates(tmp_path)


# ---- The command ----


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genssl", "plan", str(RECIPE), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_example_of_the_help_prints_what_the_help_says():
    rates = ["--generator-rate", "2.4", "--trainer-rate", "305", "--variant-size", "768"]
    done = plan("--images", "1280000", "--epochs", "100", "--variants", "10", *rates)
    assert (done.returncode, done.stderr) == (0, "")
    helped = plan("--help").stdout
    for words in ("14,815", "1,481", "1,598 h", "117 h"):
        assert words in done.stdout
        assert words in helped
    for words in ("128 such generators", "22.6 TB", "0.787", "127 x", "PNG is taken as 0.6 of raw"):
        assert words in done.stdout


def test_a_run_gives_the_rates_that_are_not_said(tmp_path):
    write_run(tmp_path / "run")
    done = plan("--images", "1437", "--from", str(tmp_path / "run"))
    assert "1 x 250 variants/s against 640 images/s" in done.stdout
    said = plan("--images", "1437", "--from", str(tmp_path / "run"), "--generator-rate", "9")
    assert "1 x 9 variants/s against 640 images/s" in said.stdout


def test_a_run_whose_variants_came_late_is_planned_by_what_its_generator_made(tmp_path):
    write_run(tmp_path / "run", variants_generated=4, variants_refreshed=0, variants_computed=40, trainer_seconds=320.0)
    done = plan("--images", "1", "--epochs", "1", "--from", str(tmp_path / "run"))
    assert "1 x 10 variants/s against 4 images/s: 1 such generator keeps up with the trainer" in done.stdout
    assert "1 image, 1 epoch, 1 variant a pair of views: 1 view wants one" in done.stdout


def test_planning_imports_neither_torch_nor_numpy(tmp_path):
    write_run(tmp_path / "run")
    code = (
        "import sys; from genssl.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('torch', 'numpy', 'grpc', 'diffusers', 'rich') if name in sys.modules])"
    )
    arguments = ["plan", str(RECIPE), "--images", "10", "--from", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "['rich']"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer-rate", "1"], "--generator-rate is missing; give it, or a run that measured it with --from DIR"),
        (["--trainer-rate", "0", "--generator-rate", "1"], "--trainer-rate is 0; a number above 0 is expected"),
        (["--trainer-rate", "1", "--generator-rate", "nan"], "--generator-rate is nan; a number above 0 is expected"),
        (["--from", "nowhere"], "--from nowhere: is not a finished run"),
        (["views.policy=none", "--trainer-rate", "1", "--generator-rate", "1"], "so there is nothing to plan"),
    ],
)
def test_mistakes_are_one_message(arguments, message):
    done = plan("--images", "10", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
