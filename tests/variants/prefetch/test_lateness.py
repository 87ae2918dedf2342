"""What is asked for and what stands in for what is late; the limit of variants an image, spread evenly."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from genssl.variants.prefetch.lateness import Lateness, VariantLimit
from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.source import REAL, VariantRequest


def requests(images: int, epoch: int) -> list[VariantRequest]:
    return [
        VariantRequest(row, hashlib.blake2b(bytes([row % 256, row // 256])).digest()[:16], epoch)
        for row in range(images)
    ]


@pytest.mark.parametrize(
    ("per_image", "uses"), [(1, 20), (3, 20), (10, 20), (10, 30), (20, 20), (25, 20), (7, 11), (1, 1)]
)
def test_every_image_gets_exactly_its_number(per_image, uses):
    limit = VariantLimit(per_image, uses, images=50)
    asked = np.array([[limit.allows(request) for request in requests(50, epoch)] for epoch in range(uses)])
    assert (asked.sum(axis=0) == min(per_image, uses)).all()
    assert asked[0].all()


def test_the_load_is_even_after_the_first_epoch():
    limit = VariantLimit(10, 40, images=1000)
    a_epoch = [sum(limit.allows(request) for request in requests(1000, epoch)) for epoch in range(40)]
    assert a_epoch[0] == 1000
    assert min(a_epoch[1:]) > 180  # 9000 over 39 epochs are 231 each
    assert max(a_epoch[1:]) < 280


def test_more_uses_than_expected_do_not_break_the_budget():
    limit = VariantLimit(3, 5, images=1)
    assert sum(limit.allows(requests(1, use)[0]) for use in range(50)) == 3


def test_what_was_dropped_is_due_again_at_the_next_use():
    limit = VariantLimit(2, 10, images=1)
    uses = [requests(1, use)[0] for use in range(10)]
    assert limit.allows(uses[0])
    for use in uses[1:4]:  # a server that is too slow for the first of them
        limit.give_back(use)
        assert limit.allows(use), "an image of which nothing was asked for is asked for again"
    assert sum(limit.allows(use) for use in uses[4:]) == 1


def image(index: int) -> np.ndarray:
    return np.full((3, 2, 2), index, np.uint8)


def test_what_the_pool_holds_is_not_asked_for_and_stands_in_for_what_is_late():
    pool = VariantPool(None, max_bytes=10 * 12, max_reuse=10)
    late = Lateness("reuse", pool)
    first, second = requests(3, 0), requests(3, 1)
    pool.add_many([request.key for request in first[:2]], [image(0)] * 2, 0)
    assert not late.waits
    assert late.to_ask(first, 0) == first[2:]
    slots = late.fill([first[0], second[1], second[2]], [None] * 3, 1)
    assert [(index, origin) for index, _, origin in slots] == [(0, "store"), (0, "reused"), (REAL, "real")]
    assert late.fill(second[:1], [(image(1), "generated")], 1)[0][2] == "generated"
    pool.close()


def test_without_a_pool_what_is_late_is_the_image_itself():
    late, wanted = Lateness("real", limit=VariantLimit(1, 2, images=2)), requests(2, 0)
    assert late.to_ask(wanted, 0) == wanted
    assert late.fill(wanted, [None, (image(0), "generated")], 0)[0] == (REAL, None, "real")
    assert late.to_ask(requests(2, 1), 1) == [], "one variant of each image"
    late.never_asked(wanted[:1])
    assert late.to_ask(requests(2, 2), 2) == requests(2, 2)[:1]
