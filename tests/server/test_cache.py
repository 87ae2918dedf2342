"""The memory cache: bounded by bytes, least recently used first."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from genssl.server.cache import MemoryCache

ENTRY = 280  # bytes beside the pixels


def image(value: int, side: int = 4):
    return np.full((3, side, side), value, np.uint8)


def test_it_drops_the_least_recently_used():
    cache = MemoryCache(3 * (48 + ENTRY))
    for value in range(3):
        cache.put(bytes([value]), image(value))
    assert cache.get(b"\0") is not None  # now 1 is the oldest
    cache.put(b"\3", image(3))
    assert cache.get(b"\1") is None
    assert [cache.get(bytes([value])).max() for value in (0, 2, 3)] == [0, 2, 3]
    assert (len(cache), cache.bytes) == (3, 3 * (48 + ENTRY))


def test_putting_again_replaces_and_does_not_count_twice():
    cache = MemoryCache(1000)
    cache.put(b"a", image(1))
    cache.put(b"a", image(2, side=8))
    assert (len(cache), cache.bytes, cache.get(b"a").max()) == (1, 192 + ENTRY, 2)


def test_sizes_differ_and_one_too_large_is_not_kept():
    cache = MemoryCache(200 + ENTRY)
    cache.put(b"a", image(1))
    cache.put(b"b", image(2, side=9))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    cache.put(b"c", image(3, side=8))
    assert cache.get(b"a") is None
    assert cache.bytes == 192 + ENTRY


def test_nothing_is_held_at_zero_bytes():
    cache = MemoryCache(0)
    cache.put(b"a", image(1))
    assert cache.get(b"a") is None
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_row_of_a_batch_does_not_hold_the_batch():
    cache = MemoryCache(1000)
    batch = np.zeros((64, 3, 4, 4), np.uint8)
    cache.put(b"a", batch[5])
    batch[5] = 9
    held = cache.get(b"a")
    assert held.base is None
    assert held.max() == 0


@pytest.mark.parametrize("side", [8, 64])
@pytest.mark.parametrize("count", [700, 3000])
def test_what_it_says_it_takes_is_what_it_takes(side, count):
    cache = MemoryCache(2**30)
    batch = np.zeros((3, side, side), np.uint8)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            cache.put(number.to_bytes(16, "little"), batch.copy())
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(cache) == count
    assert cache.bytes == pytest.approx(taken, rel=0.1)
