"""The variant store on real files: several processes at once, killed writers, damaged bytes, full disks, forks."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from genssl.variants.key import VariantKey
from genssl.variants.store.environment import VerifiedRecords
from genssl.variants.store.manifest import StoredGenerator, StoreError
from genssl.variants.store.record import HEADER, decode_image, encode, read_head
from genssl.variants.store.scan import distinct_links, link_key, open_writers
from genssl.variants.store.store import VariantStore
from genssl.variants.store.writers import network_filesystem

ROOT = Path(__file__).resolve().parents[3]
GENERATOR, OTHER, PARAMETERS = b"g" * 16, b"o" * 16, b"p" * 16


def key(number: int, source: bytes = b"s" * 16, fingerprint: bytes = GENERATOR) -> VariantKey:
    return VariantKey(source, fingerprint, PARAMETERS, number)


def image(number: int, side: int = 16):
    return np.random.default_rng(number).integers(0, 256, (3, side, side), np.uint8)


def items(numbers, side: int = 16):
    return [(key(number), image(number, side)) for number in numbers]


# A writer in a process of its own: batches of 20 variants numbered from `first`, each batch printed once it is stored.
WRITER = """
import sys
from pathlib import Path
import numpy as np
from genssl.variants.key import VariantKey
from genssl.variants.store.store import VariantStore

folder, first, batches, side = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
store = VariantStore(folder, map_bytes=2**20)
print(store.writer, flush=True)
for batch in range(batches):
    numbers = range(first + 20 * batch, first + 20 * batch + 20)
    written = store.put_many([
        (
            VariantKey(b"s" * 16, b"g" * 16, b"p" * 16, number),
            np.random.default_rng(number).integers(0, 256, (3, side, side), np.uint8),
        )
        for number in numbers
    ])
    print(numbers[0], written, flush=True)
print("done", flush=True)
sys.stdin.readline()
"""


def start_writer(folder: Path, first: int, batches: int, side: int = 16) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(folder), str(first), str(batches), str(side)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def in_fork(work) -> str:
    """Runs `work` in a forked child and returns what it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = str(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "store"


# ---- records


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_record_says_everything_and_keeps_every_pixel(encoding, channels):
    pixels = image(3)[:channels, :, :11]
    record = encode(key(2**64 - 1), pixels, encoding)
    head, decoded = read_head(record), decode_image(record)
    assert head.key == key(2**64 - 1)
    assert (head.encoding, head.shape) == (encoding, pixels.shape)
    assert abs(head.created - time.time()) < 60
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_any_flipped_byte_and_any_truncation_of_a_record_is_found(encoding):
    record = encode(key(1), image(1, side=4), encoding)
    assert decode_image(record) is not None
    for position in range(len(record)):
        damaged = bytearray(record)
        damaged[position] ^= 0x10
        assert decode_image(bytes(damaged)) is None, position
    assert all(decode_image(record[:length]) is None for length in range(len(record)))


# ---- reading and writing


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_what_was_put_comes_back_after_reopening(folder, encoding):
    with VariantStore(folder, encoding=encoding) as store:
        assert store.put_many(items(range(50))) == 50
        assert store.put_many(items(range(45, 55))) == 5  # the rest is there
    with VariantStore(folder, readonly=True) as store:
        assert len(store) == 55
        for _ in range(2):  # with the checksum, and without
            found = store.get_many([key(number).digest() for number in [54, 99, 0, 54]])
            np.testing.assert_array_equal(found[0], image(54))
            assert found[1] is None
            np.testing.assert_array_equal(found[2], image(0))
            np.testing.assert_array_equal(found[3], image(54))
            assert not found[2].flags.writeable or encoding == "png"
        assert store.get(bytes(16)) is None
        assert sorted(store.digests()) == sorted(key(number).digest() for number in range(55))


def test_sizes_may_differ_within_a_store(folder):
    with VariantStore(folder) as store:
        store.put_many([(key(0), image(0, 8)), (key(1), image(1, 200)), (key(2), image(2)[:1])])
        assert [store.get(key(number).digest()).shape for number in range(3)] == [(3, 8, 8), (3, 200, 200), (1, 16, 16)]


def test_all_variants_of_a_source_are_listed_by_index_from_every_writer(folder):
    first, second = VariantStore(folder), VariantStore(folder)
    keys = [key(index, source) for source in (b"a" * 16, b"b" * 16) for index in (300, 2, 2**40)]
    first.put_many([(one, image(0)) for one in keys[:4]])
    second.put_many([(one, image(0)) for one in keys[2:]])
    with open_writers(folder) as writers:
        listed = [link_key(*pair) for pair in distinct_links(writers)]
    assert listed == [keys[1], keys[0], keys[2], keys[4], keys[3], keys[5]]
    first.close()
    second.close()


def test_the_map_grows_with_what_is_written(folder):
    with VariantStore(folder, map_bytes=2**20) as store:
        reader = VariantStore(folder, readonly=True)
        batch = [(key(number), image(number, 64)) for number in range(300)]  # 3.7 MB in one transaction
        assert store.put_many(batch) == 300
        assert store.bytes > 3 * 2**20
        assert all(found is not None for found in reader.get_many([one.digest() for one, _ in batch]))
        reader.close()


def test_several_threads_read_and_write_one_store_while_its_map_grows(folder):
    store = VariantStore(folder, map_bytes=2**20)
    wrong: list[object] = []

    def work(thread: int) -> None:
        for batch in range(15):
            numbers = range(thread * 1000 + batch * 10, thread * 1000 + batch * 10 + 10)
            written = store.put_many(items(numbers, side=32))
            found = store.get_many([key(number).digest() for number in numbers])
            if written != 10 or any(not np.array_equal(a, image(n, 32)) for a, n in zip(found, numbers, strict=True)):
                wrong.append(numbers)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store) == 600
    store.close()


# ---- several processes


def test_two_processes_write_environments_of_their_own_and_see_each_other(folder):
    with VariantStore(folder) as mine:
        writers = [start_writer(folder, 1000 * number, batches=3) for number in range(2)]
        names = {writer.stdout.readline().strip() for writer in writers} | {mine.writer}
        assert len(names) == 3
        for writer in writers:
            assert [line.strip() for line in writer.stdout][-1:] == ["done"] if writer.stdin.close() is None else False
            assert writer.wait() == 0
        mine.refresh()
        assert len(mine) == 120
        np.testing.assert_array_equal(mine.get(key(1059).digest()), image(1059))
    with VariantStore(folder) as again:  # environments are taken over, not piled up
        assert again.writer in names
        assert len(list((folder / "writers").iterdir())) == 3


def test_a_reader_sees_what_another_process_writes_later_though_its_map_grew(folder):
    VariantStore(folder).close()
    with VariantStore(folder, readonly=True) as reader:
        wanted = [key(number).digest() for number in range(2000)]
        assert reader.get(wanted[0]) is None
        # 25 MB: beyond the map that the reader opened, and beyond the writer's first, four times doubled.
        writer = start_writer(folder, 0, batches=100, side=64)
        ends = time.monotonic() + 60
        while (count := sum(found is not None for found in reader.get_many(wanted))) < 2000:
            assert time.monotonic() < ends, f"only {count} of 2000 variants appeared"
        np.testing.assert_array_equal(reader.get(wanted[-1]), image(1999, 64))
        assert reader.damaged == 0
        writer.communicate("")


def test_a_new_writer_is_found_by_a_miss_within_a_second(folder):
    with VariantStore(folder) as mine:
        writer = start_writer(folder, 0, batches=1)
        assert "done" in writer.communicate("\n")[0]
        time.sleep(1.1)
        np.testing.assert_array_equal(mine.get(key(19).digest()), image(19))


@pytest.mark.parametrize("rounds", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_loses_nothing_that_was_stored(folder, rounds):
    delays = random.Random(0)
    committed: set[int] = set()
    for number in range(rounds):
        writer = start_writer(folder, 10_000 * number, batches=10_000, side=64)
        writer.stdout.readline()  # its name
        time.sleep(delays.uniform(0, 0.25))
        writer.send_signal(signal.SIGKILL)
        for line in writer.stdout.read().split("\n")[:-1]:
            first, written = map(int, line.split())
            assert written == 20
            committed.update(range(first, first + 20))
        writer.wait()
        with VariantStore(folder) as store:
            assert store.put_many(items([10_000 * number + 9_999], side=64)) == 1
            committed.add(10_000 * number + 9_999)
            assert len(list((folder / "writers").iterdir())) == 1  # the lock of a killed writer is free
    with VariantStore(folder, readonly=True) as store:
        assert len(committed) > 20 * rounds
        for number in committed:
            np.testing.assert_array_equal(store.get(key(number).digest()), image(number, 64))
        # A batch whose commit was done when the kill came, but not yet printed, is there as a whole.
        with open_writers(folder) as writers:
            stored = {link_key(*pair).index for pair in distinct_links(writers)}
        assert committed <= stored
        assert len(stored - committed) % 20 == 0
        assert store.damaged == 0


def test_a_forked_child_is_refused_and_the_parent_is_unharmed(folder):
    with VariantStore(folder) as store:
        store.put_many(items(range(5)))
        for use in (
            lambda: store.get(key(0).digest()),
            lambda: store.put_many(items([9])),
            lambda: len(store),
            lambda: VariantStore(folder, readonly=True),
        ):
            answer = in_fork(use)
            assert answer.startswith("StoreError: ")
            assert f"was opened in process {os.getpid()} and is used in its forked child" in answer
            assert "forkserver or spawn" in answer
        assert in_fork(store.close) == "None"
        assert store.put_many(items([5])) == 1
        np.testing.assert_array_equal(store.get(key(5).digest()), image(5))


def test_stores_of_one_process_share_environments(folder, tmp_path):
    alias = tmp_path / "alias"
    writer = VariantStore(folder)
    alias.symlink_to(folder)
    reader = VariantStore(alias, readonly=True)
    writer.put_many(items(range(3)))
    assert len(reader) == 3
    writer.close()
    assert reader.get(key(0).digest()) is not None
    again = VariantStore(folder)  # its lock is free, and what the reader holds can be written
    assert again.writer == writer.writer
    assert again.put_many(items([3])) == 1
    again.close()
    assert reader.get(key(3).digest()) is not None
    reader.close()


# ---- damage


def find(path: Path, content: bytes) -> int:
    position = path.read_bytes().find(content)
    assert position >= 0
    return position


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_a_flipped_byte_makes_a_variant_absent_and_putting_it_again_heals_it(folder, caplog):
    with VariantStore(folder) as store:
        store.put_many(items(range(30)))
        data = folder / "writers" / store.writer / "data.mdb"
    pixels = image(7).tobytes()
    overwrite(data, find(data, pixels) + 100, bytes([pixels[100] ^ 1]))
    with caplog.at_level(logging.WARNING), VariantStore(folder) as store:
        assert store.get(key(7).digest()) is None
        assert store.damaged == 1
        assert f"record {key(7).digest().hex()} fails its checksum; treated as absent" in caplog.text
        assert all(store.get(key(number).digest()) is not None for number in range(30) if number != 7)
        assert store.put_many(items([6, 7, 8])) == 1
        np.testing.assert_array_equal(store.get(key(7).digest()), image(7))
        assert len(store) == 30


def test_a_damaged_copy_does_not_hide_an_intact_one_of_another_writer(folder):
    with VariantStore(folder) as first, VariantStore(folder) as second:
        first.put_many(items([1]))
        second.put_many(items([1]))
        data = folder / "writers" / first.writer / "data.mdb"
    overwrite(data, find(data, image(1).tobytes()), bytes(16))
    with VariantStore(folder, readonly=True) as store:
        np.testing.assert_array_equal(store.get(key(1).digest()), image(1))
        assert store.damaged == 1


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty"])
def test_an_environment_that_cannot_be_read_is_left_out_and_another_is_written(folder, damage):
    with VariantStore(folder) as first, VariantStore(folder) as second:
        first.put_many(items(range(300)))
        second.put_many(items([500]))
        broken = first.writer
    data = folder / "writers" / broken / "data.mdb"
    if damage == "overwritten":
        overwrite(data, 0, b"\x5a" * 8192)
    else:
        os.truncate(data, data.stat().st_size // 2 if damage == "truncated" else 0)
    with VariantStore(folder) as store:
        assert store.writer != broken  # what is left of it may still be saved
        assert store.get(key(500).digest()) is not None
        assert store.get(key(0).digest()) is None
        assert store.put_many(items([0])) == 1
        np.testing.assert_array_equal(store.get(key(0).digest()), image(0))


# ---- limits


def test_a_store_stops_growing_at_max_bytes_and_says_so_once(folder, caplog):
    limit = 2**20
    with caplog.at_level(logging.WARNING), VariantStore(folder, max_bytes=limit) as store:
        written = [store.put_many(items(range(first, first + 50))) for first in range(0, 5000, 50)]
        assert store.full
        assert written[0] == 50
        assert written[-1] == 0
        assert 0.75 * limit < store.bytes <= limit
        assert len(store) == sum(written)
        np.testing.assert_array_equal(store.get(key(sum(written) - 1).digest()), image(sum(written) - 1))
    assert caplog.text.count("has reached its max_bytes") == 1


def test_max_bytes_counts_what_other_writers_have_stored(folder):
    with VariantStore(folder) as other, VariantStore(folder, max_bytes=2**20) as store:
        assert store.put_many(items([1])) == 1
        other.put_many(items(range(1000, 1400), side=32))  # 1.6 MB
        assert store.put_many(items(range(50))) == 0


FULL_DISK = """
import logging, resource, sys
from pathlib import Path
import numpy as np
from genssl.variants.store import store as module
from genssl.variants.key import VariantKey

logging.basicConfig(stream=sys.stdout, format="%(levelname)s")
store = module.VariantStore(Path(sys.argv[1]))
def put(first):
    return store.put_many([
        (VariantKey(b"s" * 16, b"g" * 16, b"p" * 16, n), np.full((3, 64, 64), n % 256, np.uint8))
        for n in range(first, first + 20)
    ])
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
written = [put(20 * batch) for batch in range(10)]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
module.RETRY_SECONDS, store._retry_at = 0.0, 1.0  # without waiting for the half minute
good = sum(written)
assert all((store.get(d) is not None) for d in list(store.digests()))
print(written[0], written[-1], len(store) == good, put(5000), store.damaged)
"""


def test_a_full_disk_is_logged_once_and_what_is_stored_stays_readable(folder):
    # A limit on file sizes refuses the writes of a commit as a full disk does.
    arguments = [sys.executable, "-c", FULL_DISK, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split("\n")[:2] == ["ERROR", "20 0 True 20 0"]


FULL_TMPFS = """
import sys
from pathlib import Path
import numpy as np
from genssl.variants.key import VariantKey
from genssl.variants.store.store import VariantStore
from genssl.variants.store.manifest import StoreError

store, batch = VariantStore(Path(sys.argv[1])), 0
try:
    while True:
        store.put_many([
            (VariantKey(b"s" * 16, b"g" * 16, b"p" * 16, n), np.full((3, 64, 64), n % 256, np.uint8))
            for n in range(20 * batch, 20 * batch + 20)
        ], strict=True)
        batch += 1
except StoreError as error:
    print(error)
store.close()
with VariantStore(Path(sys.argv[1]), readonly=True) as store:
    keys = [VariantKey(b"s" * 16, b"g" * 16, b"p" * 16, n) for n in range(20 * batch)]
    found = store.get_many([key.digest() for key in keys])
    print(batch, len(store), all((image == n % 256).all() for n, image in enumerate(found)))
"""


def test_a_full_disk_is_an_error_for_who_wants_one_and_what_is_stored_stays_readable(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    shell = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1/store"'
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)], check=False).returncode:
        pytest.skip("a small disk needs a user namespace, which this machine forbids")
    command = ["unshare", "-rm", "sh", "-c", shell, "sh", str(folder), sys.executable, FULL_TMPFS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    message, counts = done.stdout.splitlines()
    assert message.startswith(f"{folder}/store has no room for 20 more variants of 247,440 bytes: its disk is full (")
    assert re.search(r"; it has [234],\d{3},\d{3} bytes, and [\d,]{1,7} bytes are free on its disk\. ", message), (
        message
    )
    assert "make room, or move the store to a larger disk, and start again" in message
    batches, records, intact = counts.split()
    assert int(batches) > 5
    assert (int(records), intact) == (20 * int(batches), "True")


def test_a_strict_writer_is_told_that_max_bytes_is_reached(folder):
    with VariantStore(folder, max_bytes=2**20) as store:
        with pytest.raises(StoreError, match=r"has no room for \d+ more variants of .*: its max_bytes is 1,048,576"):
            store.put_many(items(range(1000)), strict=True)
        count = len(store)
        assert count > 50
        assert all(image is not None for image in store.get_many([key(number).digest() for number in range(count)]))
        assert store.put_many(items([9999])) in (0, 1)  # without `strict`, never an error


# ---- reading only

READER = """
import os, sys, tempfile
from pathlib import Path
from genssl.variants.store.store import VariantStore
from genssl.variants.store.manifest import StoreError

with tempfile.TemporaryDirectory() as first:  # lmdb imports a part of itself at the first opening
    VariantStore(Path(first) / "store").close()
if os.getuid() == 0:  # root may write anything; afterwards the packages may be out of reach
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
with VariantStore(Path(sys.argv[1]), readonly=True) as store:
    print(len(store), all(store.get(digest) is not None for digest in list(store.digests())), store.damaged)
try:
    VariantStore(Path(sys.argv[1]))
except StoreError as error:
    print("cannot be" in str(error))
"""


@pytest.mark.parametrize("with_lock_file", [True, False])
def test_a_store_that_may_not_be_written_is_read(with_lock_file):
    # Not pytest's folder, which another user may not enter.
    with tempfile.TemporaryDirectory() as outside:
        Path(outside).chmod(0o755)
        folder = Path(outside) / "store"
        with VariantStore(folder) as store:
            store.put_many(items(range(30)))
            lock = folder / "writers" / store.writer / "lock.mdb"
        if not with_lock_file:
            lock.unlink()
        paths = [folder, *folder.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.stat().st_mtime_ns for path in paths}
        command = [sys.executable, "-c", READER, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.split() == ["30", "True", "0", "True"]
        assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
        for path in paths:
            path.chmod(0o755)


# ---- what is verified once


def test_a_record_is_verified_at_its_first_read_by_a_process_and_by_verify_always(folder):
    with VariantStore(folder) as store:
        store.put_many(items(range(10)))
        assert store.get(key(3).digest()) is not None
        data = folder / "writers" / store.writer / "data.mdb"
        for number in (3, 4):
            pixels = image(number).tobytes()
            overwrite(data, find(data, pixels) + 100, bytes([pixels[100] ^ 1]))
        assert store.get(key(3).digest()) is not None  # read before: the price of reads at the speed of LMDB
        assert store.get(key(4).digest()) is None
        assert store.damaged == 1
    with VariantStore(folder, readonly=True) as store:
        assert store.get(key(3).digest()) is None


def test_the_table_of_verified_records_forgets_but_never_confuses():
    table = VerifiedRecords(slots=64)
    digests = [key(number).digest() for number in range(1000)]
    hashes = [hash(digest) for digest in digests]
    assert table.known(digests, hashes) == [False] * 1000
    assert table.known([bytes(16)], [0]) == [False]
    table.add(digests[:500], hashes[:500])
    known = table.known(digests, hashes)
    assert not any(table.known(digests, hashes[1:] + hashes[:1]))  # records that were not verified under these digests
    assert 32 < sum(known[:500]) <= 64
    assert not any(known[500:])
    assert table.known([], []) == []


# ---- the manifest


def test_the_manifest_names_format_version_and_generators(folder):
    with VariantStore(folder) as store:
        store.describe_generator(
            GENERATOR, StoredGenerator(name="stable_unclip", model="builtin:digits-unclip", licence="Apache-2.0")
        )
        store.put_many([*items([0]), (key(0, fingerprint=OTHER), image(0))])
    manifest = json.loads((folder / "store.json").read_text())
    assert manifest["format"] == "genssl-variants/1"
    assert manifest["created_by"].startswith("genssl ")
    assert manifest["generators"] == {
        GENERATOR.hex(): {
            "name": "stable_unclip",
            "model": "builtin:digits-unclip",
            "licence": "Apache-2.0",
            "tflops": None,
        },
        OTHER.hex(): {"name": "", "model": "", "licence": "", "tflops": None},
    }


def test_a_pinned_store_refuses_another_generator_naming_both(folder):
    with VariantStore(folder, fingerprint=GENERATOR, pin=True) as store:
        store.describe_generator(GENERATOR, StoredGenerator(name="stable_unclip", model="a/model"))
        store.put_many(items([0]))
        with pytest.raises(StoreError, match="pinned"):
            store.put_many([(key(0, fingerprint=OTHER), image(0))])
    for settings in ({"pin": True}, {"pin": False}, {"pin": True, "readonly": True}):
        with pytest.raises(StoreError) as caught:
            VariantStore(folder, fingerprint=OTHER, **settings)
        assert f"is pinned to the generator stable_unclip (a/model), fingerprint {GENERATOR.hex()}" in str(caught.value)
        assert f"this one is fingerprint {OTHER.hex()}" in str(caught.value)
    VariantStore(folder, fingerprint=GENERATOR, pin=True).close()


def test_a_store_with_another_generators_variants_cannot_be_pinned(folder):
    with VariantStore(folder) as store:
        store.put_many(items([0]))
    with pytest.raises(StoreError, match=f"holds variants of the generator fingerprint {GENERATOR.hex()}"):
        VariantStore(folder, fingerprint=OTHER, pin=True)
    VariantStore(folder, fingerprint=OTHER).close()  # without pin, keys keep generators apart


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "genssl-variants/2"}', "reads up to 'genssl-variants/1': upgrade genssl"),
        ('{"format": "tar/1"}', "its format is 'tar/1', allowed is 'genssl-variants/1'"),
        ("[]", "its format is None"),
        ("{", "is not the manifest of a variant store"),
        ('{"format": "genssl-variants/1", "generators": 3}', "generators: "),
    ],
)
def test_manifests_that_cannot_be_used_are_refused(folder, content, message):
    folder.mkdir()
    (folder / "store.json").write_text(content)
    for readonly in (True, False):
        with pytest.raises(StoreError) as caught:
            VariantStore(folder, readonly=readonly)
        assert message in str(caught.value)
        assert str(folder) in str(caught.value)


def test_a_folder_of_something_else_is_refused_and_left_alone(folder):
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"")
    with pytest.raises(StoreError, match=r"is not empty \(it holds 'cat.jpg'\); give a new or empty folder"):
        VariantStore(folder)
    with pytest.raises(StoreError, match=r"has no store\.json"):
        VariantStore(folder, readonly=True)
    assert [path.name for path in folder.iterdir()] == ["cat.jpg"]


def test_reading_makes_no_store(folder):
    with pytest.raises(StoreError, match="is not a variant store"):
        VariantStore(folder, readonly=True)
    assert not folder.exists()


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made in"):
        VariantStore(tmp_path / "file" / "store")


def test_unknown_keys_of_the_manifest_are_kept(folder):
    VariantStore(folder).close()
    manifest = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**manifest, "dataset": "digits"}))
    with VariantStore(folder) as store:
        store.describe_generator(GENERATOR, StoredGenerator(name="x"))
    assert json.loads((folder / "store.json").read_text())["dataset"] == "digits"


# ---- the rest


def test_a_local_folder_is_not_taken_for_a_network_one(tmp_path):
    assert network_filesystem(tmp_path) is None
    assert network_filesystem(Path("/proc/self")) is None


def test_nothing_here_imports_torch_or_grpc():
    code = (
        "import sys, genssl.variants.store.store, genssl.server.cache, genssl.variants.prefetch.pool;"
        "print({'torch', 'grpc', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_the_header_has_the_documented_size():
    assert HEADER.size == 84  # a change here needs a new format number
