"""Rates of the store and the pool: `pytest tests/benchmarks/test_store.py --benchmark-only --benchmark-group-by=group`.

Aims: random reads through the public API at least half as fast as bare LMDB's, 20 KB a record, and twice a folder of
files, once the process has verified what it reads; 128 stand-ins from the pool in 2 ms. One round handles BATCH
variants.
"""

from __future__ import annotations

import itertools
import statistics
import time

import lmdb
import numpy as np
import pytest

from genssl.variants.key import VariantKey
from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.store.store import VariantStore

BATCH, COUNT, SIDE = 128, 8192, 82  # 3 * 82 * 82 = 20,172 bytes
IMAGES = np.random.default_rng(0).integers(0, 256, (BATCH, 3, SIDE, SIDE), np.uint8)


def key(number: int) -> VariantKey:
    return VariantKey(number.to_bytes(16, "little"), b"g" * 16, b"p" * 16, number)


def batches(digests, seed=1):
    order = np.random.default_rng(seed).permutation(len(digests))
    return itertools.cycle([[digests[n] for n in part] for part in order.reshape(-1, BATCH)])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with VariantStore(tmp_path_factory.mktemp("bench") / "store") as store:
        for first in range(0, COUNT, BATCH):
            assert store.put_many([(key(first + n), IMAGES[n]) for n in range(BATCH)]) == BATCH
        yield store


@pytest.mark.benchmark(group="read")
def test_random_reads(benchmark, store, tmp_path):
    """The three ways take turns, so that what else the machine does meets all of them alike."""
    digests = [key(number).digest() for number in range(COUNT)]
    (tmp_path / "files").mkdir()
    paths = [tmp_path / "files" / f"{number}.bin" for number in range(COUNT)]
    for number, path in enumerate(paths):
        path.write_bytes(IMAGES[number % BATCH].tobytes())
    with lmdb.open(str(tmp_path), map_size=2**30) as environment:
        with environment.begin(write=True) as txn:
            for number, digest in enumerate(digests):
                txn.put(digest, IMAGES[number % BATCH].tobytes())
        seconds: dict[str, list[float]] = {"lmdb": [], "files": [], "store": []}
        wanted, wanted_of_lmdb, wanted_files = batches(digests), batches(digests, 2), batches(paths, 3)

        def read_lmdb():
            part = next(wanted_of_lmdb)
            with environment.begin() as txn:
                return [txn.get(digest) for digest in part]

        def read_files():
            return [path.read_bytes() for path in next(wanted_files)]

        def read_store():
            return store.get_many(next(wanted))

        def timed(name, read):
            begun = time.perf_counter()
            found = read()
            seconds[name].append(time.perf_counter() - begun)
            assert all(one is not None for one in found)

        def others():
            timed("lmdb", read_lmdb)
            timed("files", read_files)

        for _ in range(COUNT // BATCH):
            timed("store", read_store)
        first = statistics.median(seconds["store"])
        seconds["store"].clear()
        benchmark.pedantic(lambda: timed("store", read_store), setup=others, rounds=4 * COUNT // BATCH)
    rates = {name: BATCH / statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info |= {f"{name}_records_per_second": round(rate) for name, rate in rates.items()}
    benchmark.extra_info["first_reads_per_second"] = round(BATCH / first)  # with the checksum
    benchmark.extra_info["of_lmdb"] = round(rates["store"] / rates["lmdb"], 2)
    benchmark.extra_info["of_files"] = round(rates["store"] / rates["files"], 2)
    assert rates["store"] >= 0.5 * rates["lmdb"]
    assert rates["store"] >= 2 * rates["files"]


@pytest.mark.benchmark(group="write")
@pytest.mark.parametrize("batch", [16, BATCH])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_writes(benchmark, tmp_path, batch, encoding):
    with VariantStore(tmp_path / "store", encoding=encoding) as store:
        numbers = itertools.count()

        def write() -> int:
            return store.put_many([(key(next(numbers)), IMAGES[n]) for n in range(batch)])

        assert benchmark.pedantic(write, rounds=40, warmup_rounds=2) == batch


@pytest.mark.benchmark(group="pool")
@pytest.mark.parametrize("side", [32, 82, 224])
def test_128_stand_ins(benchmark, side):
    pool = VariantPool(None, max_bytes=2**28, max_reuse=10**6)
    image = np.zeros((3, side, side), np.uint8)
    sources = [number.to_bytes(16, "little") for number in range(170)]
    for index in range(10):
        for source in sources:
            pool.add_many([(source, index)], [image], index)

    def choose():
        return [pool.choose(source, 99, 0) for source in sources[:BATCH]]

    assert all(chosen is not None for chosen in benchmark(choose))
    pool.close()
