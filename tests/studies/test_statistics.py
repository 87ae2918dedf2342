"""Intervals and paired differences, against numbers from a table of Student's t."""

from __future__ import annotations

import pytest

from genssl.studies.statistics import estimate, paired_difference


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
