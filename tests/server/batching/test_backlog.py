"""What waits by batch key and class, and the seconds that it takes."""

from __future__ import annotations

import random

import pytest

from genssl.server.batching.backlog import Backlog


def test_sums_that_are_kept_equal_sums_worked_out_anew():
    generator, backlog = random.Random(1), Backlog(3)
    rows: dict[str, list[int]] = {}

    def price(key: object, count: int) -> float:
        return len(str(key)) * (1 + count)

    for _ in range(3000):
        key, lane = "k" * generator.randrange(1, 12), generator.randrange(3)
        held = rows.setdefault(key, [0, 0, 0])
        change = generator.choice([1, 1, 2, -1, -held[lane]])
        if not change or held[lane] + change < 0:
            continue
        held[lane] += change
        backlog.count(key, lane + 1, change)
        backlog.settle(price)
        if generator.random() < 0.1:
            new, priority = {"k": 2, "kkk": 1, "new": 4}, generator.randrange(1, 4)
            ahead = {key: sum(held[:priority]) for key, held in rows.items() if sum(held[:priority])}
            expected = sum(price(key, ahead.get(key, 0) + new.get(key, 0)) for key in ahead.keys() | new.keys())
            assert backlog.seconds(new, priority, 1.0, price) == pytest.approx(expected)
        assert backlog.waiting(key) == sum(held)
