"""What a run does when its variants are late, and what it can do about it afterwards: replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.training.progress import RunProgress
from genssl.training.run import run

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "simclr_sd.yaml"
QUICK = ["train.epochs=1", "schedule.warmup_epochs=0", "backbone.width=4", "train.threads=1", "evaluate=[]"]
STEPS = 1437 // 128
DETERMINISTIC = ["variants.batching=deterministic"]
# A server that is far too slow: 12 denoising steps where the recipe has 2.
SLOW = [
    "generator.num_inference_steps=12",
    "variants.per_image=3",
    "variants.max_reuse=4",
    "variants.prefetch_steps=auto",
    "variants.rows_per_request=16",
    "variants.buckets=[16]",
]


def recipe_of(*overrides: str) -> Recipe:
    return load(Recipe, RECIPE, [*QUICK, *overrides])


def quietly(recipe: Recipe, out: Path) -> dict:
    with (out.parent / f"{out.name}.txt").open("w") as text, RunProgress(Console(file=text, width=200)) as progress:
        return run(recipe, out, progress)


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_file(a / "encoder.safetensors"), load_file(b / "encoder.safetensors")
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def wanted(ledger: dict) -> int:
    names = ("variants_generated", "variants_from_store", "variants_reused", "fallbacks_to_real")
    return sum(ledger[name] for name in names)


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """A run under `late: reuse` whose server is far too slow, and its directory."""
    out = tmp_path_factory.mktemp("late") / "reuse"
    recipe = recipe_of("variants.late=reuse", "train.epochs=3", *SLOW, *DETERMINISTIC)
    return quietly(recipe, out), out, recipe


def test_a_slow_server_does_not_hold_up_a_run_that_reuses(slow_run):
    results, out, _ = slow_run
    ledger = results["ledger"]
    assert wanted(ledger) == 3 * STEPS * 128, "every slot is accounted for"
    assert ledger["variants_reused"] > 0
    assert 1 <= ledger["reuse_max"] <= 4
    assert ledger["variants_dropped"] > 0
    # A step of this tiny encoder takes about as long as 30 reads of the pool; see the slow test for the real one.
    assert ledger["stall_seconds"] <= 0.1 * (ledger["stall_seconds"] + ledger["trainer_seconds"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(wanted(row) == (epoch + 1) * STEPS * 128 for epoch, row in enumerate(rows))
    assert rows[-1]["prefetch_depth"] > 2, "a fetch takes longer than no time; tests of the depth pin the law"
    assert rows[-1]["fetch_seconds_p95"] > 0


def test_a_run_that_is_mostly_stale_does_not_call_itself_online(slow_run):
    results, out, _ = slow_run
    assert results["ledger"]["fresh_fraction"] < 0.5
    assert results["provenance"]["variants"]["source"].startswith("online, mostly re")
    said = (out.parent / "reuse.txt").read_text()
    assert "not simply online" in said.replace("\n", " ")
    assert "reused" in said
    page = (out / "report.html").read_text()
    assert "variants used again" in page
    assert "real images instead" in page
    assert "not simply online" in page


def test_a_replay_of_a_late_run_is_bit_identical(slow_run, tmp_path):
    first, out, recipe = slow_run
    replay = recipe.variants.model_copy(update={"replay": out / "assignments.jsonl"})
    again = quietly(recipe.model_copy(update={"variants": replay}), tmp_path / "again")
    assert same_weights(out, tmp_path / "again")
    for name in ("variants_reused", "fallbacks_to_real", "distinct_variants", "reuse_max", "fresh_fraction"):
        assert again["ledger"][name] == first["ledger"][name]
    assert wanted(again["ledger"]) == wanted(first["ledger"])


@pytest.mark.slow
def test_a_budget_bounds_what_is_generated_and_the_rest_is_reused(tmp_path):
    epochs, budget = 8, 2
    recipe = recipe_of("variants.late=reuse", f"variants.budget={budget}", f"train.epochs={epochs}")
    results = quietly(recipe, tmp_path / "budget")
    ledger = results["ledger"]
    assert wanted(ledger) == epochs * STEPS * 128
    # Views of the first epoch may find no variant yet, the more the further this tiny encoder runs ahead of the server;
    # none is asked for in its place.
    assert 0 < ledger["variants_computed"] <= budget * 1437
    assert ledger["variants_computed"] >= ledger["variants_generated"]
    assert ledger["distinct_variants"] <= ledger["variants_computed"]
    assert ledger["variants_reused"] > ledger["variants_generated"]
    assert "variants.budget allows 2 variants an image" in results["provenance"]["variants"]["note"]


def test_a_log_of_another_plan_is_refused(slow_run, tmp_path):
    _, out, _ = slow_run
    recipe = recipe_of(
        *SLOW, *DETERMINISTIC, "variants.source=in_process", "seed=7", f"variants.replay={out / 'assignments.jsonl'}"
    )
    with pytest.raises(UserError, match=r"is the log of another plan: seed 0 \(this recipe: 7\)"):
        quietly(recipe, tmp_path / "other")
    longer = recipe.model_copy(update={"seed": 0, "train": recipe.train.model_copy(update={"epochs": 4})})
    with pytest.raises(UserError, match=rf"ends before step {3 * STEPS}, but this recipe has {4 * STEPS} steps"):
        quietly(longer, tmp_path / "longer")


@pytest.mark.slow
def test_late_real_takes_the_image_itself_and_never_another_variant(tmp_path):
    # Fresh, so that nothing can come from the memory of the server either.
    recipe = recipe_of("variants.late=real", "train.epochs=2", *SLOW, "variants.per_image=fresh")
    results = quietly(recipe, tmp_path / "real")
    ledger = results["ledger"]
    assert wanted(ledger) == 2 * STEPS * 128
    assert ledger["fallbacks_to_real"] > 0
    assert ledger["variants_reused"] == ledger["variants_from_store"] == 0


@pytest.mark.slow
def test_a_server_that_keeps_up_makes_a_reuse_run_fresh_and_refreshes_the_pool(tmp_path):
    recipe = recipe_of(
        "variants.late=reuse",
        "variants.refresh={budget: 16}",
        "train.epochs=3",
        "backbone.width=32",
        "generator.num_inference_steps=1",
    )
    ledger = quietly(recipe, tmp_path / "fast")["ledger"]
    assert wanted(ledger) == 3 * STEPS * 128
    assert ledger["fresh_fraction"] > 0.5
    assert ledger["variants_refreshed"] > 0
    assert ledger["variants_from_store"] > 0, "what was generated ahead is what the plan wants later"


def test_training_from_the_server_equals_training_in_process_bit_for_bit(tmp_path):
    """With every batch padded to one size and one thread on either side, a variant's bits depend on its name alone."""
    for source in ("online", "in_process"):
        quietly(recipe_of(f"variants.source={source}", *DETERMINISTIC), tmp_path / source)
    assert same_weights(tmp_path / "online", tmp_path / "in_process")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_four_times_too_slow_costs_no_time_and_reuses_within_bounds(tmp_path):
    """The shipped recipe with a wider encoder, and a server process slowed down by its denoising steps."""
    recipe = load(
        Recipe,
        RECIPE,
        [
            "train.epochs=8",
            "backbone.width=32",
            "evaluate=[]",
            "variants.late=reuse",
            "variants.prefetch_steps=auto",
            "variants.max_reuse=10",
            "variants.max_age_steps=60",
            "generator.num_inference_steps=40",
        ],
    )
    ledger = quietly(recipe, tmp_path / "slow")["ledger"]
    wall = ledger["stall_seconds"] + ledger["trainer_seconds"]
    demand, rate = wanted(ledger) / wall, ledger["bytes_received"] / (3 * 8 * 8) / wall
    print(f"demand {demand:.0f}/s, server {rate:.0f}/s, stall {ledger['stall_seconds'] / wall:.2%}", ledger)
    assert demand >= 4 * rate > 0
    assert ledger["stall_seconds"] <= 0.02 * wall
    assert wanted(ledger) == 8 * STEPS * 128
    assert 1 <= ledger["reuse_mean"] <= ledger["reuse_max"] <= 10
    assert ledger["variants_reused"] > 0
    assert ledger["fresh_fraction"] > 0.02, "the server works for steps still to come, not for those that passed"
