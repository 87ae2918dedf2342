"""The pool of received variants: what it gives in place of a late one, within its bounds, always the same way."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from genssl.variants.prefetch.pool import PoolError, VariantPool

A, B = b"a" * 16, b"b" * 16
SIDE = 8
SLOT = 3 * SIDE * SIDE


def image(value: int, side: int = SIDE):
    return np.full((3, side, side), value % 256, np.uint8)


@pytest.fixture
def make_pool():
    pools = []

    def make(slots: int = 100, max_reuse: int = 10, **settings) -> VariantPool:
        pools.append(VariantPool(None, max_bytes=slots * SLOT, max_reuse=max_reuse, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def fill(pool: VariantPool, source: bytes, indices, step: int = 0) -> None:
    indices = list(indices)
    pool.add_many([(source, index) for index in indices], [image(index) for index in indices], step)


def test_it_gives_another_variant_of_the_same_source_only(make_pool):
    pool = make_pool()
    assert pool.choose(A, 0, 0) is None
    fill(pool, A, [7])
    index, pixels = pool.choose(A, 0, 0)
    assert index == 7
    np.testing.assert_array_equal(pixels, image(7))
    assert pool.choose(B, 0, 0) is None


def test_sources_in_one_chain_are_told_apart(make_pool):
    pool = make_pool(slots=4)
    # Equal in the half that the table hashes, and equal in its low bits.
    sources = [b"\0" * 8 + bytes([n]) * 8 for n in range(2)] + [b"\0" * 4 + bytes([n]) * 4 + b"\0" * 8 for n in (1, 2)]
    for number, source in enumerate(sources):
        fill(pool, source, [number])
    assert [pool.choose(source, 99, 0)[0] for source in sources] == [0, 1, 2, 3]


def test_the_least_used_goes_first_then_the_longest_held_then_the_lowest_index(make_pool):
    pool = make_pool()
    fill(pool, A, [5, 3], step=2)
    fill(pool, A, [4], step=1)
    pool.used_fresh(A, 3)
    assert [pool.choose(A, 99, 2)[0] for _ in range(7)] == [4, 5, 4, 3, 5, 4, 3]


def test_a_variant_stands_in_at_most_max_reuse_times_and_fresh_use_is_not_counted(make_pool):
    pool = make_pool(max_reuse=2)
    fill(pool, A, [0, 1])
    pool.used_fresh(A, 0)
    chosen = [pool.choose(A, 99, 0) for _ in range(5)]
    assert [one and one[0] for one in chosen] == [1, 0, 1, 0, None]


def test_an_old_variant_stands_in_for_nothing_until_it_is_received_again(make_pool):
    pool = make_pool(max_age_steps=5)
    fill(pool, A, [0], step=10)
    assert pool.choose(A, 99, 15)[0] == 0
    assert pool.choose(A, 99, 16) is None
    fill(pool, A, [0], step=16)
    assert len(pool) == 1
    assert pool.choose(A, 99, 20)[0] == 0


def test_the_wanted_variant_itself_is_given_without_bound_and_is_no_reuse(make_pool):
    pool = make_pool(max_reuse=1)
    fill(pool, A, [0, 1])
    assert [pool.choose(A, 1, 10**6)[0] for _ in range(3)] == [1, 1, 1]
    assert pool.choose(A, 99, 0)[0] == 0  # 1 has been used


def test_the_oldest_received_make_room(make_pool):
    pool = make_pool(slots=3)
    fill(pool, A, [0, 1, 2])
    fill(pool, A, [0])  # received again: 1 is the oldest now
    fill(pool, B, [9])
    assert len(pool) == 3
    assert {pool.choose(A, index, 0)[0] == index for index in (0, 2)} == {True}
    assert pool.choose(A, 1, 0)[0] != 1
    assert pool.choose(B, 9, 0)[0] == 9


def test_a_source_keeps_its_newest(make_pool):
    pool = make_pool(max_per_source=2)
    fill(pool, B, [50])
    for step in range(5):
        fill(pool, A, [step], step=step)
    held = {pool.choose(A, 99, 5)[0] for _ in range(10)}
    assert held == {3, 4}
    assert pool.choose(B, 99, 5)[0] == 50
    assert len(pool) == 3


def test_a_source_has_a_bound_unless_told_otherwise(make_pool):
    pool, unbounded = make_pool(slots=200), make_pool(slots=200, max_per_source=None)
    for one in (pool, unbounded):
        fill(one, A, range(100))
    assert (len(pool), len(unbounded)) == (32, 100)
    assert [index for index in range(100) if pool.holds(A, index)] == list(range(68, 100))


def test_what_is_kept_outlives_what_came_before_it_and_after(make_pool):
    pool = make_pool(slots=6, max_per_source=3)
    fill(pool, A, [0, 1, 2], step=1)
    fill(pool, B, [0, 1, 2], step=2)
    assert pool.keep([(A, 0), (A, 7), (B, 0)]) == [True, False, True]
    fill(pool, A, [3, 4], step=3)
    fill(pool, b"c" * 16, [0], step=3)
    held = [(source, index) for source in (A, B) for index in range(5) if pool.holds(source, index)]
    assert held == [(A, 0), (A, 3), (A, 4), (B, 0), (B, 2)]
    assert pool.lost() == []
    fill(pool, A, [5], step=4)
    assert not pool.holds(A, 0)
    assert pool.lost() == [(A, 0)]
    assert pool.lost() == [], "each is told once"
    fill(pool, A, [0], step=5)
    fill(pool, A, [6, 7, 8], step=5)
    assert pool.lost() == [], "what came anew was not kept"


def test_keeping_makes_nothing_younger(make_pool):
    pool = make_pool(max_age_steps=5)
    fill(pool, A, [0], step=10)
    pool.keep([(A, 0)])
    assert pool.choose(A, 99, 16) is None


def test_it_agrees_with_a_plain_model_of_its_rules(make_pool):
    random = np.random.default_rng(0)
    slots, max_reuse, max_age, per_source = 40, 3, 30, 6
    pool = make_pool(slots, max_reuse, max_age_steps=max_age, max_per_source=per_source)
    sources = [random.bytes(16) for _ in range(12)]
    model: dict[tuple[int, int], list[int]] = {}  # insertion order is order of receipt; [step, reuses, fresh]
    given = 0
    for step in range(3000):
        source, index, action = int(random.integers(12)), int(random.integers(20)), int(random.integers(6))
        if action <= 1:
            pool.add_many([(sources[source], index)], [image(source * 20 + index)], step)
            if (source, index) in model:
                model[source, index] = [step, *model.pop((source, index))[1:]]
            else:
                own = [key for key in model if key[0] == source]
                if len(own) == per_source:
                    del model[own[0]]
                elif len(model) == slots:
                    del model[next(iter(model))]
                model[source, index] = [step, 0, 0]
        elif action == 5:
            assert pool.keep([(sources[source], index)]) == [(source, index) in model]
            if (source, index) in model:
                model[source, index] = model.pop((source, index))
        elif action == 2:
            pool.used_fresh(sources[source], index)
            if (source, index) in model:
                model[source, index][2] = 1
        else:
            ranks = [
                (state[1] + state[2], state[0], key[1])
                for key, state in model.items()
                if key[0] == source and state[1] < max_reuse and step - state[0] <= max_age
            ]
            expected = index if (source, index) in model else min(ranks)[2] if ranks else None
            chosen = pool.choose(sources[source], index, step)
            assert (chosen and chosen[0]) == expected, step
            if chosen is not None:
                given += 1
                assert (chosen[1] == (source * 20 + chosen[0]) % 256).all()
                model[source, chosen[0]][2 if chosen[0] == index else 1] += chosen[0] != index
                if chosen[0] == index:
                    model[source, index][2] = 1
    assert given > 500
    assert len(pool) == len(model)


def test_two_threads_get_whole_images_of_the_right_source(make_pool):
    pool = make_pool(slots=50)
    sources = [bytes([n]) * 16 for n in range(20)]
    stop = threading.Event()
    failures = []

    def receive() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            for number, source in enumerate(sources):
                pool.add_many([(source, step)], [image(number)], step)

    thread = threading.Thread(target=receive)
    thread.start()
    seen, ends = 0, time.monotonic() + 1.0
    while time.monotonic() < ends:
        for number, source in enumerate(sources):
            chosen = pool.choose(source, 2**63, 0)
            if chosen is not None:
                seen += 1
                if not (chosen[1] == number).all():
                    failures.append(number)
    stop.set()
    thread.join()
    assert not failures
    assert seen > 100


def test_a_pool_too_small_for_one_variant_says_what_to_raise(make_pool):
    pool = VariantPool(None, max_bytes=SLOT - 1, max_reuse=1)
    said = rf"pool_bytes is {SLOT - 1} but one variant has {SLOT} bytes; raise it"
    for _ in range(2):  # the next piece that comes must not end the run with something else
        with pytest.raises(PoolError, match=said):
            fill(pool, A, [0])
    with pytest.raises(PoolError, match=said):
        pool.check(SLOT)
    pool.check(SLOT - 1)
    pool.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PoolError, match="file/pool"):
        VariantPool(tmp_path / "file" / "pool", max_bytes=2**20, max_reuse=1)


def test_nothing_is_left_in_the_folder_and_closing_is_quiet(tmp_path):
    pool = VariantPool(tmp_path, max_bytes=2**20, max_reuse=1)
    fill(pool, A, [0])
    assert list(tmp_path.iterdir()) == []
    pool.close()
    pool.close()
    fill(pool, A, [1])  # the prefetch thread may be a little late
    assert pool.choose(A, 0, 0) is None
    assert len(pool) == 0


FULL_DISK = """
import resource, sys
import numpy as np
from genssl.variants.prefetch.pool import VariantPool
resource.setrlimit(resource.RLIMIT_FSIZE, (10 * 192 + 50, -1))
pool = VariantPool(None, max_bytes=100 * 192, max_reuse=1000)
for index in range(30):
    pool.add_many([(b"a" * 16, index)], [np.full((3, 8, 8), index, np.uint8)], 0)
chosen = [pool.choose(b"a" * 16, 99, 0) for _ in range(20)]
assert all((pixels == index).all() for index, pixels in chosen)
print(len(pool), pool.refused, sorted({index for index, _ in chosen}))
"""


def test_a_full_disk_is_counted_and_what_is_held_stays_right():
    # The limit on file sizes makes pwrite fail as a full disk does, half-written slot included.
    done = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == f"10 20 {list(range(10))}"


def test_a_hundred_thousand_entries_take_less_than_200_bytes_each():
    count = 100_000
    pool = VariantPool(None, max_bytes=count * 3, max_reuse=1)
    pixel = np.zeros((3, 1, 1), np.uint8)
    pool.add_many([(bytes(16), 0)], [pixel], 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sources = np.random.default_rng(0).bytes(16 * count)
    for number in range(count):
        pool.add_many([(sources[16 * number : 16 * number + 16], 1)], [pixel], number)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert len(pool) == count
    assert sum(column.nbytes for column in pool._arrays) / count < 64
    assert grown / count < 200
    pool.close()


ROOT = Path(__file__).resolve().parents[3]
