"""The prefetch depth: Little's law, bounded in bytes and in steps."""

from __future__ import annotations

import pytest

from genssl.variants.ledger import Ledger
from genssl.variants.prefetch.depth import PrefetchDepth, bytes_per_step


def depth(setting="auto", *, latency: float | None = None, max_bytes: int = 2**28, per_step: float = 1000.0):
    ledger = Ledger()
    if latency is not None:
        ledger.fetch_seconds.extend([latency] * 20)
    return PrefetchDepth(setting, bytes_per_step=per_step, max_bytes=max_bytes, ledger=ledger), ledger


def test_a_number_that_fits_stays_as_it_is():
    fixed, ledger = depth(33, latency=60.0, max_bytes=33_000)
    for _ in range(120):
        fixed.step_done(0.01)
    assert fixed.steps == ledger.prefetch_depth == 33
    assert fixed.note == ""
    assert fixed.note == ""


def test_a_number_is_cut_to_what_fits_the_bytes_and_says_so():
    fixed, ledger = depth(1024, latency=60.0, per_step=28e6)
    for _ in range(120):
        fixed.step_done(0.01)
    assert fixed.steps == ledger.prefetch_depth == 9
    assert fixed.note
    assert "prefetch_steps is 1024, but variants.prefetch_bytes (268,435,456) holds no more than" in fixed.note
    assert fixed.note.endswith(
        "so 9 are asked for ahead; raise prefetch_bytes to 28,672,000,000 or lower prefetch_steps"
    )
    assert depth(latency=60.0, max_bytes=10)[0].note == "", "auto was given no number"


def test_auto_is_latency_over_step_time_and_two_more():
    auto, ledger = depth(latency=0.95)
    for _ in range(4):
        auto.step_done(0.1)
    assert auto.steps == 8, "too early to tell"
    auto.step_done(0.1)
    assert auto.steps == ledger.prefetch_depth == 12
    ledger.fetch_seconds.extend([0.05] * 600)
    for _ in range(44):
        auto.step_done(0.1)
    assert auto.steps == 3
    assert auto.steps == ledger.prefetch_depth


def test_auto_follows_the_slow_answers_not_the_mean():
    auto, ledger = depth(latency=0.1)
    ledger.fetch_seconds.extend([1.0] * 2)
    for _ in range(5):
        auto.step_done(0.1)
    assert auto.steps == 12


def test_auto_grows_at_most_fourfold_at_a_time():
    auto, _ = depth(latency=10.0)
    seen = []
    for _ in range(100):
        auto.step_done(0.1)
        if auto.steps not in seen:
            seen.append(auto.steps)
    assert seen == [8, 32, 102]


def test_auto_is_bounded_in_bytes_and_in_steps():
    small, _ = depth(latency=10.0, max_bytes=20_500)
    assert small.steps == 8
    large, _ = depth(latency=1e6)
    tiny, _ = depth(latency=10.0, max_bytes=10)
    for _ in range(1000):
        for one in (small, large, tiny):
            one.step_done(0.1)
    assert (small.steps, large.steps, tiny.steps) == (20, 1024, 1)


@pytest.mark.parametrize(
    ("probability", "images"), [(1.0, 256), (0.0, 0), (0.5, 160)], ids=["all", "none", "half: mean 128, deviation 8"]
)
def test_bytes_of_a_step(probability, images):
    assert bytes_per_step(128, 2, probability, 8) == images * 3 * 64
