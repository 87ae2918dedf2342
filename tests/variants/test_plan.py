"""The view plan: a pure function, the same however it is asked."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from genssl.variants.plan import ViewPlan, variant_columns, view_columns
from genssl.variants.source import REAL

SOURCES, BATCH = 103, 10


def plan(**changes) -> ViewPlan:
    settings = {
        "seed": 1,
        "num_sources": SOURCES,
        "batch_size": BATCH,
        "policy": "second",
        "probability": 1.0,
        "per_image": "fresh",
    }
    return ViewPlan(**{**settings, **changes})


def epoch_of(view_plan: ViewPlan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    steps = [view_plan.step(epoch, step) for step in range(view_plan.steps_per_epoch)]
    return np.concatenate([step.rows for step in steps]), np.concatenate([step.indices for step in steps])


def test_a_step_does_not_depend_on_what_was_asked_before():
    ordered, alone = plan(policy="both", probability=0.5), plan(policy="both", probability=0.5)
    for epoch in range(3):
        epoch_of(ordered, epoch)
    a, b = ordered.step(2, 4), alone.step(2, 4)
    assert np.array_equal(a.rows, b.rows)
    assert np.array_equal(a.indices, b.indices)


def test_an_epoch_visits_every_source_at_most_once_and_fills_whole_batches():
    rows, _ = epoch_of(plan(), 0)
    assert len(rows) == SOURCES // BATCH * BATCH
    assert len(set(rows)) == len(rows)


def test_epochs_and_seeds_have_their_own_order():
    orders = [tuple(epoch_of(plan(seed=seed), epoch)[0]) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_second_makes_only_view_two_a_variant():
    _, indices = epoch_of(plan(), 0)
    assert (indices[:, 0] == REAL).all()
    assert (indices[:, 1] != REAL).all()


def test_none_makes_no_variant():
    _, indices = epoch_of(plan(policy="none"), 0)
    assert (indices == REAL).all()


def test_both_draws_each_view_independently_with_probability_p():
    big = plan(num_sources=20_000, batch_size=20_000, policy="both", probability=0.3)
    chosen = big.step(0, 0).indices != REAL
    assert chosen[:, 0].mean() == pytest.approx(0.3, abs=0.015)
    assert chosen[:, 1].mean() == pytest.approx(0.3, abs=0.015)
    assert (chosen[:, 0] & chosen[:, 1]).mean() == pytest.approx(0.09, abs=0.01)


def test_fresh_never_repeats_an_index_of_a_source_within_runs_and_across_seeds():
    seen: set[tuple[int, int]] = set()
    count = 0
    for seed in (0, 1):
        for epoch in range(4):
            rows, indices = epoch_of(plan(seed=seed, policy="both"), epoch)
            seen.update((int(row), int(index)) for row, pair in zip(rows, indices, strict=True) for index in pair)
            count += indices.size
    assert len(seen) == count
    assert all(0 <= index < 2**64 for _, index in seen)


def test_per_image_stays_below_k_and_uses_all_of_it():
    big = plan(num_sources=5000, batch_size=5000, per_image=10)
    indices = big.step(0, 0).indices[:, 1]
    assert set(indices) == set(range(10))
    assert np.bincount(indices).min() > 400
    assert not np.array_equal(indices, big.step(1, 0).indices[:, 1])


def test_ranks_share_the_batches_of_one_process():
    whole = plan(num_sources=96, batch_size=12, policy="both", probability=0.5)
    ranks = [
        plan(num_sources=96, batch_size=12, policy="both", probability=0.5, rank=rank, world_size=3)
        for rank in range(3)
    ]
    for step in range(whole.steps_per_epoch):
        parts = [one.step(1, step) for one in ranks]
        assert np.array_equal(np.concatenate([part.rows for part in parts]), whole.step(1, step).rows)
        assert np.array_equal(np.concatenate([part.indices for part in parts]), whole.step(1, step).indices)


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="more than the 103 images"):
        plan(batch_size=104)
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        plan(world_size=3)


@pytest.mark.parametrize(
    ("policy", "per_image", "recorded"),
    [
        ("second", "fresh", "22d35b2c482dbbe9962a19e4"),
        ("second", 10, "eba5dfc8b9724810c1374ab2"),
        ("both", "fresh", "af6c78039ecf61a72cc11185"),
        ("both", 10, "631951224d4afd95456e4119"),
        ("none", "fresh", "f910c69750f1d513a188d0b5"),
        ("none", 10, "f910c69750f1d513a188d0b5"),
    ],
)
def test_plans_are_those_that_were_recorded(policy, per_image, recorded):
    """Stores, logs and finished runs depend on them: they never change."""
    known = ViewPlan(seed=3, num_sources=64, batch_size=16, policy=policy, probability=0.5, per_image=per_image)
    digest = hashlib.blake2b(digest_size=12)
    for epoch in range(3):
        for step in range(known.steps_per_epoch):
            planned = known.step(epoch, step)
            digest.update(planned.rows.tobytes() + planned.indices.tobytes())
    assert digest.hexdigest() == recorded


@pytest.mark.parametrize(
    ("policy", "count", "columns", "variant", "views"),
    [
        ("none", 1, 2, (), (0, 1)),
        ("second", 3, 2, (1,), (0, 1)),
        ("both", 1, 2, (0, 1), (0, 1)),
        ("third", 3, 5, (2, 3, 4), (0, 1, 2, 3, 4)),
        ("added", 1, 1, (0,), (0, 0)),
    ],
)
def test_columns_of_a_policy(policy, count, columns, variant, views):
    assert variant_columns(policy, count) == (columns, variant)
    assert view_columns(columns) == views
    indices = plan(policy=policy, third_count=count).step(0, 0).indices
    assert indices.shape == (BATCH, columns)
    assert indices.dtype == np.int64
    assert [column for column in range(columns) if (indices[:, column] != REAL).all()] == list(variant)
    assert (np.delete(indices, variant, axis=1) == REAL).all()


def test_third_draws_each_further_view_by_itself():
    big = plan(num_sources=20_000, batch_size=20_000, policy="third", third_count=3, probability=0.4, per_image=8)
    step = big.step(0, 0)
    assert (step.indices[:, :2] == REAL).all()
    chosen = step.indices[:, 2:] != REAL
    assert chosen.mean(axis=0) == pytest.approx([0.4] * 3, abs=0.015)
    assert np.corrcoef(chosen.T) == pytest.approx(np.eye(3), abs=0.03)
    numbers = plan(num_sources=20_000, batch_size=20_000, policy="third", third_count=2, per_image=8).step(0, 0).indices
    table = np.histogram2d(numbers[:, 2], numbers[:, 3], bins=8)[0]
    assert table == pytest.approx(np.full((8, 8), 20_000 / 64), rel=0.25)


@pytest.mark.parametrize(("policy", "count"), [("third", 1), ("third", 4), ("added", 1)])
def test_fresh_never_repeats_an_index_with_other_numbers_of_columns(policy, count):
    seen: set[tuple[int, int]] = set()
    wanted = 0
    for seed in (0, 1):
        for epoch in range(4):
            rows, indices = epoch_of(plan(seed=seed, policy=policy, third_count=count), epoch)
            for row, of_row in zip(rows, indices, strict=True):
                seen.update((int(row), int(index)) for index in of_row if index != REAL)
            wanted += int((indices != REAL).sum())
    assert len(seen) == wanted == 2 * 4 * 100 * count


def test_ranks_know_their_place_in_the_batch():
    parts = [plan(num_sources=96, batch_size=12, rank=rank, world_size=3).step(1, 5) for rank in range(3)]
    assert [(part.start, part.batch_size, len(part.rows)) for part in parts] == [(0, 12, 4), (4, 12, 4), (8, 12, 4)]
