"""The view plan: a pure function, the same however it is asked."""

from __future__ import annotations

import numpy as np
import pytest

from genssl.variants.plan import REAL, ViewPlan

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
