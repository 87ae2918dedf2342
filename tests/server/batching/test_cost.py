"""The cost model: what it learns, and which batches it finds cheapest."""

from __future__ import annotations

import numpy as np
import pytest

from genssl.server.batching.cost import KEYS, CostModel

BUCKETS = [1, 4, 16, 64]
KEY = ("steps", 2)


def learnt(fixed: float, per_row: float, buckets=(1, 16), batches: int = 20, noise: float = 0.0) -> CostModel:
    cost, random = CostModel(), np.random.default_rng(0)
    for _ in range(batches):
        for bucket in buckets:
            cost.observe(KEY, bucket, (fixed + per_row * bucket) * (1 + noise * random.standard_normal()))
    return cost


def test_before_any_batch_nothing_is_known_and_everything_is_padded():
    cost = CostModel()
    assert cost.predict(KEY, 10, BUCKETS) is None
    assert cost.latest_key is None
    assert cost.next_batch(KEY, 17, BUCKETS) == (17, 64)
    assert cost.next_batch(KEY, 200, BUCKETS) == (64, 64)


def test_the_line_speaks_for_buckets_that_have_not_run():
    cost = learnt(0.010, 0.002, noise=0.05)
    assert cost.seconds(KEY, 64) == pytest.approx(0.138, rel=0.1)
    assert cost.seconds(KEY, 4) == pytest.approx(0.018, rel=0.1)
    assert cost.predict(KEY, 130, BUCKETS) == pytest.approx(2 * 0.138 + 2 * 0.012, rel=0.1)


def test_a_bucket_that_has_run_speaks_for_itself():
    cost = learnt(0.010, 0.002)
    cost.observe(KEY, 64, 0.5)
    assert cost.seconds(KEY, 64) == 0.5


def test_one_batch_gives_a_first_idea():
    cost = CostModel()
    cost.observe(KEY, 16, 0.16)
    assert cost.seconds(KEY, 64) == pytest.approx(0.64)
    assert cost.next_batch(KEY, 17, BUCKETS) == (17, 64), "too little to split batches by"


def test_a_key_that_has_not_run_is_taken_for_the_latest():
    cost = learnt(0.010, 0.002)
    assert cost.predict(("other",), 16, BUCKETS) == pytest.approx(0.042)


def test_neither_a_slow_first_batch_nor_a_stall_spoils_the_mean():
    cost = CostModel()
    cost.observe(KEY, 16, 5.0)
    for _ in range(30):
        cost.observe(KEY, 16, 0.1)
    assert cost.seconds(KEY, 16) == pytest.approx(0.1)
    cost.observe(KEY, 16, 60.0)
    assert cost.seconds(KEY, 16) < 0.15


def test_an_estimate_that_is_far_too_high_falls_at_once():
    cost = learnt(0.0, 1.0, (16,))
    cost.observe(KEY, 16, 0.1)
    assert cost.seconds(KEY, 16) <= 0.4
    cost.observe(KEY, 16, 0.1)
    assert cost.seconds(KEY, 16) == pytest.approx(0.1)


def test_a_first_batch_does_not_outweigh_what_others_say():
    cost = learnt(0.010, 0.002)
    cost.observe(KEY, 64, 300.0)
    assert cost.seconds(KEY, 64) < 1


def test_a_lasting_change_is_learnt():
    cost = learnt(0.010, 0.002)
    for _ in range(50):
        cost.observe(KEY, 16, 0.4)
    assert cost.seconds(KEY, 16) == pytest.approx(0.4, rel=0.02)


def test_small_batches_go_apart_where_rows_cost_and_together_where_batches_cost():
    costly_rows = learnt(0.001, 0.010, BUCKETS)
    assert costly_rows.next_batch(KEY, 17, BUCKETS) == (16, 16)
    assert costly_rows.next_batch(KEY, 63, BUCKETS) == (63, 64)
    costly_batches = learnt(0.100, 0.0001, BUCKETS)
    assert costly_batches.next_batch(KEY, 17, BUCKETS) == (17, 64)


def test_falling_times_give_no_negative_line():
    cost = CostModel()
    cost.observe(KEY, 1, 0.2)
    cost.observe(KEY, 16, 0.1)
    assert 0.1 <= cost.seconds(KEY, 64) <= 0.2
    steep = CostModel()
    steep.observe(KEY, 4, 0.01)
    steep.observe(KEY, 16, 1.0)
    assert steep.seconds(KEY, 1) > 0


def test_keys_that_clients_invent_do_not_pile_up():
    cost = CostModel()
    cost.observe(KEY, 1, 1.0)
    for key in range(KEYS):
        cost.observe(key, 1, 2.0)
    assert cost.seconds(KEY, 1) == 2.0, "forgotten, so the latest stands for it"
