"""Flipped bits in LMDB's own pages, which have no checksum: no image of another variant, no loss without a word.

The flips lead LMDB to a wrong page or to an older commit. None is of a kind that it dies of.
"""

from __future__ import annotations

import logging
import shutil
import struct
import subprocess
import sys
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
import pytest

from genssl.variants.key import VariantKey
from genssl.variants.store.export import export
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.merge import merge
from genssl.variants.store.scan import statistics
from genssl.variants.store.store import VariantStore
from genssl.variants.store.verify import verify

PAGE, LEAF, OVERFLOW, BIG = 4096, 2, 4, 1
HEADER = struct.Struct("<QHHHH")  # page number, -, kind, end of the pointers, start of the nodes
NODE = struct.Struct("<HHHH")  # size, size, flags, size of the key
TRANSACTION, MAGIC, KIND = 144, 16, 10  # positions in a meta page
COUNT, COMMITS = 300, (200, 260, 300)


def key(number: int) -> VariantKey:
    return VariantKey((number // 5).to_bytes(16, "big"), b"g" * 16, b"p" * 16, number % 5)


DIGESTS = [key(number).digest() for number in range(COUNT)]
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT + 3, 3, 36, 36), np.uint8)  # too large for a page of the tree


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A store of 300 records in three commits."""
    folder = tmp_path_factory.mktemp("sound") / "store"
    with VariantStore(folder) as store:
        for first, last in zip((0, *COMMITS), COMMITS, strict=False):
            store.put_many([(key(number), IMAGES[number]) for number in range(first, last)], strict=True)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "store")


def data_of(folder: Path) -> Path:
    (data,) = folder.glob("writers/*/data.mdb")
    return data


def pages(content: bytes, kind: int) -> list[int]:
    """Returns the positions of all pages of a kind, of older commits too."""
    found = []
    for position in range(2 * PAGE, len(content), PAGE):
        number, _, flags, _, _ = HEADER.unpack_from(content, position)
        if (number * PAGE, flags) == (position, kind):
            found.append(position)
    return found


def pointers(content: bytes) -> dict[int, tuple[bytes, int]]:
    """Returns digest and page of every record that has pages of its own, by the position of that page's number."""
    found = {}
    for page in pages(content, LEAF):
        lower = HEADER.unpack_from(content, page)[3]
        for (offset,) in struct.iter_unpack("<H", content[page + 16 : page + lower]):
            _, _, flags, size = NODE.unpack_from(content, page + offset)
            place = page + offset + NODE.size + size
            if flags == BIG:
                found[place] = (content[place - size : place], *struct.unpack_from("<Q", content, place))
    return found


def misleading(content: bytes) -> list[tuple[int, int]]:
    """Returns (position, bit) of flips in the newest commit that lead one digest to the record of another."""
    holds = {page: digest for digest, page in pointers(content).values()}
    found = []
    for place, (digest, page) in pointers(content).items():
        for bit in range(20):
            if holds.get(page ^ (1 << bit), digest) != digest:
                found.append((place + bit // 8, bit % 8))
    return found


def flip(data: Path, *bits: tuple[int, int]) -> None:
    with data.open("r+b") as file:
        for position, bit in bits:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ (1 << bit)]))


def newest_meta(data: Path) -> int:
    content = data.read_bytes()
    return max((0, PAGE), key=lambda page: struct.unpack_from("<Q", content, page + TRANSACTION))


def lose_the_last_commit(data: Path) -> None:
    """Makes the transaction number of the newer meta page the smaller one, and its commit the older."""
    meta = newest_meta(data)
    (number,) = struct.unpack_from("<Q", data.read_bytes(), meta + TRANSACTION)
    flip(data, (meta + TRANSACTION, number.bit_length() - 1))


def misled(store: VariantStore) -> int:
    """Returns how many digests have no image, having seen that none has another's."""
    absent = 0
    for number, found in enumerate(store.get_many(DIGESTS)):
        assert (found is None) == (store.get(DIGESTS[number]) is None)
        if found is None:
            absent += 1
        else:
            np.testing.assert_array_equal(found, IMAGES[number])
    return absent


# ---- a page of the tree


def test_a_flip_that_leads_to_another_variants_record_makes_it_absent(folder):
    data = data_of(folder)
    flips = misleading(data.read_bytes())
    assert len(flips) > 1000
    absent = 0
    for one in flips[:: len(flips) // 20]:
        flip(data, one)
        with VariantStore(folder, readonly=True) as store:
            assert misled(store) <= 1
            absent += store.damaged > 0
        flip(data, one)
    assert absent > 3  # the others are in leaves of older commits
    with VariantStore(folder, readonly=True) as store:
        assert misled(store) == 0


def test_a_record_that_was_read_before_is_compared_at_every_read(folder):
    data = data_of(folder)
    with VariantStore(folder, readonly=True) as store:
        assert misled(store) == 0  # their checksums are not computed again
        flip(data, *islice(misleading(data.read_bytes()), 0, None, 97))
        assert 5 < misled(store) < 200
        assert store.damaged > 5


@pytest.fixture
def led_astray(folder) -> tuple[Path, list[int]]:
    """The store with flips in it, and which variants are absent."""
    data = data_of(folder)
    flip(data, *islice(misleading(data.read_bytes()), 0, None, 97))
    with VariantStore(folder, readonly=True) as store:
        absent = [number for number in range(COUNT) if store.get(DIGESTS[number]) is None]
    with lmdb.open(str(data.parent), max_dbs=2, readonly=True) as bare, bare.begin() as transaction:
        held = transaction.get(DIGESTS[absent[0]], db=bare.open_db(b"variants", transaction, create=False))
    others = [number for number in range(COUNT) if IMAGES[number].tobytes() in held]
    assert others, "LMDB hands out an intact record"
    assert others != absent[:1]
    return folder, absent


def test_nothing_hands_on_another_variants_record(led_astray, tmp_path):
    folder, absent = led_astray
    names = {DIGESTS[number].hex() for number in absent}
    damage = verify(folder).damage
    assert {line.split()[2].rstrip(":") for line in damage if "it is another variant" in line} == names
    assert statistics(folder).formats["damaged", (0, 0, 0)][0] == len(absent)
    assert {line.split()[2] for line in merge(tmp_path / "merged", [folder]).damaged} == names
    for store in (folder, tmp_path / "merged"):
        done = export(store, tmp_path / f"png-{store.name}", "folder")
        assert (done.variants, done.damaged) == (COUNT - len(absent), len(absent) if store == folder else 0)
    assert verify(tmp_path / "merged").damage == []
    names = [f"{key(n).source_id.hex()}_{key(n).index}.png" for n in range(COUNT) if n not in absent]
    for pictures in tmp_path.glob("png-*"):
        assert sorted(path.name for path in pictures.glob("*.png")) == sorted(names)


def test_what_is_absent_is_made_again_elsewhere_and_the_damaged_tree_is_left_alone(led_astray):
    folder, absent = led_astray
    data = data_of(folder)
    with VariantStore(folder) as store:
        broken, before = store.writer, data.read_bytes()
        for number in absent:  # to replace them there would free the pages of others
            assert store.put_many([(key(number), IMAGES[number])]) == 1
        assert store.writer != broken
        assert misled(store) == 0
        assert data.read_bytes() == before
    with VariantStore(folder, readonly=True) as store:
        assert misled(store) == 0


def test_a_scan_does_not_go_round_in_a_page_whose_order_is_damaged(folder, caplog):
    data = data_of(folder)
    with data.open("r+b") as file:
        content = data.read_bytes()
        for page in pages(content, LEAF):
            lower = HEADER.unpack_from(content, page)[3]
            offsets = content[page + 16 : page + lower]
            file.seek(page + 16)
            file.write(offsets[-2:] + offsets[2:-2] + offsets[:2] if len(offsets) > 40 else offsets)
    with VariantStore(folder, readonly=True) as store:
        found = list(islice(store.digests(), 10 * COUNT))
        assert len(found) == len(set(found)) < COUNT
        assert "the records are not in order" in caplog.text
        misled(store)
    assert any("not in order" in line for line in verify(folder).damage)


# ---- a meta page


def test_no_flip_in_a_meta_page_loses_records_without_a_word(folder, caplog):
    """Of those that LMDB answers: magic, version, kind of page, size of a page, number of the transaction."""
    data = data_of(folder)
    fields = [KIND, MAGIC, MAGIC + 3, 20, 41, TRANSACTION, TRANSACTION + 5]
    lost = 0
    for one in [(page + field, bit) for page in (0, PAGE) for field in fields for bit in (0, 1, 3)]:
        flip(data, one)
        caplog.clear()
        with VariantStore(folder, readonly=True) as store:
            absent = sum(found is None for found in store.get_many(DIGESTS))
            assert store.damaged or not absent, one
            assert caplog.text or not absent, one
        lost += absent > 0
        flip(data, one)
    assert lost > 20


@pytest.mark.parametrize("field", [KIND, MAGIC, TRANSACTION])
def test_verify_misses_what_a_meta_page_lost(folder, field):
    data = data_of(folder)
    if field == TRANSACTION:
        lose_the_last_commit(data)
    else:
        flip(data, (newest_meta(data) + field, 3))
    found = verify(folder)
    assert found.records == (260 if field == TRANSACTION else 0)
    assert found.damage
    told = "of 300 records that were committed here 260 are left" if field == TRANSACTION else "it cannot be read: "
    assert found.damage[0].startswith(f"{data.parent.name}: {told}")


def test_what_is_left_of_a_lost_commit_is_read_and_not_written_over(folder, tmp_path, caplog):
    data = data_of(folder)
    lose_the_last_commit(data)
    before = data.read_bytes()
    with caplog.at_level(logging.WARNING), VariantStore(folder) as store:
        assert "of 300 records that were committed here 260 are left" in caplog.text
        assert store.damaged == 1
        assert store.writer != data.parent.name
        assert misled(store) == 40
        store.put_many([(key(number), IMAGES[number]) for number in range(260, 280)], strict=True)
    assert data.read_bytes() == before
    told = "of 300 records that were committed here 260 are left"
    assert statistics(folder).writers[data.parent.name].damage == told
    assert export(folder, tmp_path / "png", "folder").lacking == [f"{data.parent.name}: {told}"]
    done = merge(tmp_path / "merged", [folder])
    assert (done.variants, done.damaged) == (280, [f"{folder.resolve() / data.parent.name}: {told}"])
    (number,) = struct.unpack_from("<Q", before, newest_meta(data) + TRANSACTION)
    flip(data, ((newest_meta(data) ^ PAGE) + TRANSACTION, (number + 1).bit_length() - 1))  # repaired
    assert verify(folder).damage == []
    with VariantStore(folder) as store:
        assert store.writer == data.parent.name
        assert misled(store) == 0


@pytest.mark.parametrize("gone", ["emptied", "removed"])
def test_a_file_that_is_gone_is_missed_and_not_begun_afresh(folder, gone):
    data = data_of(folder)
    data.unlink()
    if gone == "emptied":
        data.touch()
    assert "300 records were committed here" in verify(folder).damage[0]
    with VariantStore(folder) as store:
        assert store.writer != data.parent.name
        assert store.damaged == 1
    with pytest.raises(StoreError, match="nothing of it is left to export"):
        export(folder, folder.parent / "png", "folder")


# ---- the count


def test_a_store_without_a_count_is_checked_as_before_and_gets_one_when_it_is_written(folder):
    count = data_of(folder).parent / "committed"
    count.unlink()
    command = [sys.executable, "-m", "genssl", "store", "verify", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.endswith("300 records and 300 links of 1 writer, all intact")
    assert second.endswith("as an earlier genssl left it, so that lost commits would not be seen")
    VariantStore(folder).close()
    lose_the_last_commit(data_of(folder))
    assert "of 300 records that were committed here 260 are left" in verify(folder).damage[0]


@pytest.mark.parametrize("content", [b"", b"00000000000000000400 00000000\n"], ids=["empty", "flipped"])
def test_a_damaged_count_is_no_count(folder, content):
    (data_of(folder).parent / "committed").write_bytes(content)
    found = verify(folder)
    assert (found.records, found.damage, found.uncounted) == (300, [], 1)
    with VariantStore(folder) as store:
        assert store.writer == data_of(folder).parent.name
    assert (data_of(folder).parent / "committed").read_bytes().startswith(b"00000000000000000300 ")


def test_the_count_is_right_after_every_commit(folder):
    with VariantStore(folder) as store:
        for number in range(COUNT, COUNT + 3):
            store.put_many([(key(number), IMAGES[number])])
            committed = (data_of(folder).parent / "committed").read_text()
            assert committed.startswith(f"{number + 1:020d} ")
