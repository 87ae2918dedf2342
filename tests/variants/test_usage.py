"""The count of distinct variants: exact, and small."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter

import numpy as np

from genssl.variants.usage import VariantUsage


def test_it_agrees_with_a_set_and_a_counter(monkeypatch):
    monkeypatch.setattr("genssl.variants.usage.PENDING", 100)
    random = np.random.default_rng(0)
    usage, distinct, stood_in = VariantUsage(), set(), Counter()
    for number in range(20_000):
        source, index, stands_in = (
            bytes([random.integers(200)]) * 16,
            int(random.integers(50)),
            bool(random.integers(2)),
        )
        usage.add(source, index, stands_in)
        distinct.add((source, index))
        if stands_in:
            stood_in[source, index] += 1
        if number % 4999 == 0:
            assert usage.distinct == len(distinct)
            assert usage.stand_ins == len(stood_in)
            assert usage.most_stand_ins == max(stood_in.values(), default=0)
    assert usage.distinct == len(distinct) > 8000
    assert usage.stand_ins == len(stood_in) > 5000
    assert usage.most_stand_ins == max(stood_in.values()) > 3


def test_nothing_used_is_nothing_counted():
    usage = VariantUsage()
    assert (usage.distinct, usage.stand_ins, usage.most_stand_ins) == (0, 0, 0)


def test_a_variant_takes_at_most_sixteen_bytes_even_while_it_is_sorted_in():
    count, sources = 600_000, [bytes([number]) * 16 for number in range(250)]
    usage = VariantUsage()
    tracemalloc.start()
    try:
        for number in range(count):
            usage.add(sources[number % 250], number, False)
        assert usage.distinct == count
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / count < 13
    # What waits to be sorted in is of a fixed size until it is small against the rest.
    assert (most - 65_536 * 60) / count < 14


def test_it_goes_to_another_process():
    usage = VariantUsage()
    usage.add(bytes(16), 3, True)
    copied = pickle.loads(pickle.dumps(usage))
    copied.add(bytes(16), 3, True)
    assert (copied.distinct, copied.most_stand_ins, usage.most_stand_ins) == (1, 2, 1)
