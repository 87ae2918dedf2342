"""Verify, count, merge, export and import on real stores: damaged bytes, killed processes, tars read by tarfile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genssl.data.base import StoredImage, raw_image
from genssl.errors import DataError, UserError
from genssl.variants.key import VariantKey, parameters_digest
from genssl.variants.store.environment import Entry, Environment
from genssl.variants.store.export import export
from genssl.variants.store.import_folder import foreign_fingerprint, import_folder
from genssl.variants.store.manifest import StoredGenerator, StoreError
from genssl.variants.store.merge import merge
from genssl.variants.store.record import encode
from genssl.variants.store.scan import Progress, links, open_writers, records, statistics
from genssl.variants.store.store import VariantStore
from genssl.variants.store.verify import verify

ROOT = Path(__file__).resolve().parents[3]
GENERATOR, OTHER, PARAMETERS = b"g" * 16, b"o" * 16, b"p" * 16
OF_SOURCE = 5


def key(number: int, fingerprint: bytes = GENERATOR) -> VariantKey:
    return VariantKey((number // OF_SOURCE).to_bytes(16, "big"), fingerprint, PARAMETERS, number % OF_SOURCE)


def image(number: int, side: int = 16):
    return np.random.default_rng(number).integers(0, 256, (3, side, side), np.uint8)


def make(folder: Path, numbers, *, fingerprint: bytes = GENERATOR, side: int = 16, **options) -> Path:
    with VariantStore(folder, fingerprint=fingerprint, **options) as store:
        items = [(key(number, fingerprint), image(number, side)) for number in numbers]
        assert store.put_many(items, strict=True) == len(items)
    return folder


def data_of(folder: Path) -> Path:
    (data,) = folder.glob("writers/*/data.mdb")
    return data


def flip(data: Path, content: bytes) -> None:
    position = data.read_bytes().find(content)
    assert position >= 0
    with data.open("r+b") as file:
        file.seek(position)
        file.write(bytes([content[0] ^ 1]))


def put_raw(folder: Path, entry: Entry) -> None:
    """Writes what VariantStore would not."""
    environment = Environment.open(data_of(folder).parent, writable=True)
    assert environment.put_many([entry]) == 1
    environment.release()


def content(folder: Path) -> dict[bytes, bytes]:
    """Returns every digest with its pixels."""
    with VariantStore(folder, readonly=True) as store:
        digests = list(store.digests())
        return {digest: found.tobytes() for digest, found in zip(digests, store.get_many(digests), strict=True)}


class Seen(Progress):
    total = done = 0

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, done: int) -> None:
        self.done += done


# ---- verify


def test_a_sound_store_is_clean_and_nothing_in_it_is_changed(tmp_path):
    folder = make(tmp_path / "store", range(300))
    with VariantStore(folder) as first, VariantStore(folder) as second:
        assert first.put_many([(key(400), image(400))]) == 1
        assert second.put_many([(key(0), image(0))]) == 1  # a copy
    before = {path: path.read_bytes() for path in folder.rglob("data.mdb")}
    seen = Seen()
    found = verify(folder, seen)
    assert (found.writers, found.records, found.links, found.damage) == (2, 302, 302, [])
    assert (seen.total, seen.done) == (302, 302)
    assert {path: path.read_bytes() for path in folder.rglob("data.mdb")} == before


def test_every_kind_of_damage_is_named(tmp_path):
    folder = make(tmp_path / "store", range(40), pin=True)
    writer, strange = data_of(folder).parent.name, key(50, OTHER)
    link = (0).to_bytes(8, "big") + GENERATOR + PARAMETERS
    put_raw(folder, Entry(b"x" * 16, encode(key(7), image(7)), key(7).source_id, link))
    put_raw(folder, Entry(key(60).digest(), encode(key(60), image(60)), b"y" * 16, link))
    put_raw(
        folder, Entry(strange.digest(), encode(strange, image(50)), strange.source_id, link[:8] + OTHER + PARAMETERS)
    )
    flip(data_of(folder), image(3).tobytes())
    assert sorted(verify(folder).damage) == sorted(
        [
            f"{writer}: record {key(3).digest().hex()}: its checksum is wrong",
            f"{writer}: record {(b'x' * 16).hex()}: it is another variant, {key(7).digest().hex()}",
            f"{writer}: record {key(60).digest().hex()}: it is not in the list of its source {key(60).source_id.hex()}",
            f"{writer}: source {(b'y' * 16).hex()}: variant 0 is in its list, but has no record",
            f"{writer}: record {strange.digest().hex()}: it is of the generator {OTHER.hex()}, to which the store is "
            "not pinned",
        ]
    )


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "a page of the tree"])
def test_a_damaged_tree_is_damage_and_the_other_writers_are_still_checked(tmp_path, damage):
    folder = make(tmp_path / "store", range(400))
    data = data_of(folder)
    with VariantStore(folder) as _, VariantStore(folder) as second:
        second.put_many([(key(1000), image(1000))])
    content = bytearray(data.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "overwritten":
        content[:8192] = b"\x5a" * 8192
    else:
        page = content.find(key(7).digest()) // 4096 * 4096
        while page >= 0 and content.find(key(7).digest(), page) >= 0:  # all generations of the leaf
            content[page + 16 : page + 4096] = b"\xa5" * 4080
            page = content.find(key(7).digest()) // 4096 * 4096
    data.write_bytes(content)
    found = verify(folder)
    assert found.damage
    assert all(line.startswith(f"{data.parent.name}: ") for line in found.damage)
    assert found.writers == 2
    assert found.records >= 1


# ---- statistics


def test_statistics_count_copies_once(tmp_path):
    folder = make(tmp_path / "store", range(13))
    with VariantStore(folder) as first, VariantStore(folder, encoding="png") as second:
        first.put_many([(key(100, OTHER), image(1, 8))])
        second.put_many([(key(number), image(number)) for number in range(3)])
    found = statistics(folder)
    assert (found.variants, found.records, found.sources) == (14, 17, 4)
    assert dict(found.per_source) == {5: 2, 3: 1, 1: 1}
    assert dict(found.per_generator) == {GENERATOR.hex(): 13, OTHER.hex(): 1}
    assert {format_: records for format_, (records, _) in found.formats.items()} == {
        ("raw", (3, 16, 16)): 13,
        ("raw", (3, 8, 8)): 1,
        ("png", (3, 16, 16)): 3,
    }
    assert found.formats["raw", (3, 16, 16)][1] == 13 * (84 + 3 * 16 * 16)
    assert sorted(writer.records for writer in found.writers.values()) == [3, 14]
    assert found.file_bytes == sum(path.stat().st_size for path in folder.rglob("data.mdb"))


# ---- merge


def test_a_merge_is_the_union_and_the_same_bytes_whatever_the_order(tmp_path):
    stores = [make(tmp_path / name, numbers) for name, numbers in (("a", range(90)), ("b", range(60, 200)))]
    stores.append(make(tmp_path / "c", range(150, 160), fingerprint=OTHER))
    one, other = tmp_path / "one", tmp_path / "other"
    assert merge(one, stores).variants == 210
    assert merge(other, [*reversed(stores), stores[0]]).variants == 210
    assert data_of(one).read_bytes() == data_of(other).read_bytes()
    assert (one / "store.json").read_bytes() == (other / "store.json").read_bytes()
    assert content(one) == content(stores[0]) | content(stores[1]) | content(stores[2])
    assert verify(one).damage == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "one", "other"]
    with VariantStore(one) as store:  # it is a store like any other
        assert store.put_many([(key(999), image(999))]) == 1


def test_an_intact_copy_takes_the_place_of_a_damaged_one_and_what_none_has_is_named(tmp_path):
    first, second = make(tmp_path / "a", range(10)), make(tmp_path / "b", range(5, 10))
    for number in (2, 7):
        flip(data_of(first), image(number).tobytes())
    done = merge(tmp_path / "out", [first, second])
    assert done.variants == 9
    assert sorted(line.split()[2] for line in done.damaged) == sorted(key(n).digest().hex() for n in (2, 7))
    assert content(tmp_path / "out")[key(7).digest()] == image(7).tobytes()


def test_pinned_generators_are_not_mixed(tmp_path):
    mine, strange = make(tmp_path / "a", range(5), pin=True), make(tmp_path / "b", range(5), fingerprint=OTHER)
    again = make(tmp_path / "c", range(3, 9))
    with pytest.raises(StoreError) as caught:
        merge(tmp_path / "out", [strange, mine])
    assert f"{mine} is pinned to the generator fingerprint {GENERATOR.hex()}, but {strange} holds" in str(caught.value)
    assert not (tmp_path / "out").exists()
    merge(tmp_path / "out", [mine, again])
    assert json.loads((tmp_path / "out" / "store.json").read_text())["pinned"] == GENERATOR.hex()


def test_what_the_manifests_say_is_kept_where_they_agree(tmp_path):
    stores = [make(tmp_path / name, range(3)) for name in "ab"]
    said = (
        {"by": "me", "blocks": [{"name": "z"}], "datasets": {"d": {"name": "digits", "variants": 3}}},
        {"by": "you", "blocks": [{"name": "a"}, {"name": "z"}], "datasets": {"d": {"name": "digits", "variants": 10}}},
    )
    for store, extra in zip(stores, said, strict=True):
        manifest = json.loads((store / "store.json").read_text())
        (store / "store.json").write_text(json.dumps({**manifest, **extra}))
    with VariantStore(stores[1]) as store:
        store.describe_generator(GENERATOR, StoredGenerator(name="flow", licence="MIT"))  # type: ignore[attr-defined]
    assert merge(tmp_path / "out", stores).dropped == ["by"]
    merged = json.loads((tmp_path / "out" / "store.json").read_text())
    assert "by" not in merged
    assert merged["blocks"] == [{"name": "a"}, {"name": "z"}]
    assert merged["datasets"] == {"d": {"name": "digits", "variants": 10}}
    assert merged["generators"][GENERATOR.hex()]["licence"] == "MIT"
    merge(tmp_path / "other", stores[::-1])
    assert (tmp_path / "other" / "store.json").read_bytes() == (tmp_path / "out" / "store.json").read_bytes()


def test_merging_into_something_is_refused(tmp_path):
    store = make(tmp_path / "a", range(3))
    for out in (store, tmp_path):
        with pytest.raises(UserError, match="exists and is not an empty folder; give a new folder"):
            merge(out, [store])
    with pytest.raises(StoreError, match="is not a variant store"):
        merge(tmp_path / "out", [store, tmp_path / "nothing"])
    assert not (tmp_path / "out").exists()


def everything_in(folder: Path) -> list[tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]]:
    with open_writers(folder) as writers:
        return [(list(records(writer.environment)), list(links(writer.environment))) for writer in writers]


def run_and_kill(arguments: list[str], begun: Path, seconds: float) -> int:
    """Kills `genssl store` some time after `begun` has appeared; returns the exit code, -9 unless it was faster."""
    process = subprocess.Popen(
        [sys.executable, "-m", "genssl", "store", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not begun.exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.parametrize("rounds", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_a_merge_that_is_killed_goes_on_and_ends_with_the_same_records(tmp_path, rounds):
    stores = [make(tmp_path / "a", range(1500), side=24), make(tmp_path / "b", range(1000, 3000), side=24)]
    expected, out = tmp_path / "expected", tmp_path / "out"
    begun = time.monotonic()
    merge(expected, stores)
    whole = time.monotonic() - begun
    delays, killed = random.Random(0), 0
    merged = tmp_path / ".out.merging" / "writers" / "merged-000" / "data.mdb"
    for _ in range(rounds):
        ended = run_and_kill(["merge", str(out), *map(str, stores)], merged, delays.uniform(0, 1.5 * whole / rounds))
        killed += ended == -signal.SIGKILL
        if out.exists():
            break
    assert killed, "at least one was killed"
    if not out.exists():
        assert merge(out, stores).variants == 3000
    assert everything_in(out) == everything_in(expected)
    assert (out / "store.json").read_bytes() == (expected / "store.json").read_bytes()
    assert verify(out).damage == []


def test_a_merge_goes_on_behind_what_is_there_and_begins_again_with_other_stores(tmp_path):
    first, second = make(tmp_path / "a", range(200)), make(tmp_path / "b", range(100, 300))
    out = tmp_path / "out"

    class StopAtHalf(Seen):
        def advance(self, done: int) -> None:
            super().advance(done)
            if self.done > 200:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(out, [first, second], StopAtHalf())
    assert not out.exists()
    third = make(tmp_path / "c", range(50))
    copy = tmp_path / ".copy"
    shutil.copytree(tmp_path / ".out.merging", copy)
    assert 0 < merge(out, [second, first]).resumed < 300
    shutil.rmtree(out)
    copy.rename(tmp_path / ".out.merging")
    done = merge(out, [third])
    assert (done.resumed, done.variants) == (0, 50)


# ---- export


def pictures_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_webdataset_shards_hold_every_variant_in_order(tmp_path):
    folder = make(tmp_path / "store", range(60), encoding="png")
    with VariantStore(folder) as store:
        store.put_many([(key(number), image(number)) for number in range(60, 120)])  # raw
        store.describe_generator(GENERATOR, StoredGenerator(name="flow", licence="MIT"))
    done = export(folder, tmp_path / "out", "webdataset", shard_bytes=64 * 1024)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in shards] == [f"variants-{number:06d}.tar" for number in range(done.shards)]
    assert done.shards > 3
    assert all(path.stat().st_size <= 64 * 1024 for path in shards)
    names = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            assert len(members) % 2 == 0
            for picture, about in zip(members[::2], members[1::2], strict=True):
                number = len(names)
                stem = f"{key(number).source_id.hex()}_{number % OF_SOURCE}"
                names.append(stem)
                assert (picture.name, about.name) == (f"{stem}.png", f"{stem}.json")
                with Image.open(tar.extractfile(picture)) as opened:
                    np.testing.assert_array_equal(np.asarray(opened).transpose(2, 0, 1), image(number))
                told = json.load(tar.extractfile(about))
                assert told["pixels"] == raw_image(image(number)).source_id.hex()
                assert (told["key"], told["seed"]) == (key(number).digest().hex(), key(number).seed())
                names_of_it = {name: told[name] for name in ("source_id", "index", "fingerprint", "parameters")}
                assert names_of_it == {
                    "source_id": key(number).source_id.hex(),
                    "index": number % OF_SOURCE,
                    "fingerprint": GENERATOR.hex(),
                    "parameters": PARAMETERS.hex(),
                }
                assert [told[name] for name in ("channels", "height", "width")] == [3, 16, 16]
    assert len(names) == done.variants == 120
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert described["generator"] == {"name": "flow", "model": "", "licence": "MIT", "tflops": None}
    assert sum(shard["variants"] for shard in described["shards"]) == 120


@pytest.mark.parametrize("format_", ["webdataset", "folder"])
def test_equal_variants_are_exported_as_equal_bytes(tmp_path, format_):
    make(tmp_path / "a", range(40))
    time.sleep(0.01)  # another time of writing
    make(tmp_path / "b", range(20, 40), encoding="png")
    make(tmp_path / "b", range(20))
    for name in "ab":
        export(tmp_path / name, tmp_path / f"out-{name}", format_)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / f"out-{name}").iterdir()} for name in "ab")
    assert one == other
    assert len(one) == (82 if format_ == "folder" else 3)


def test_a_folder_of_pngs_leaves_damaged_variants_out(tmp_path):
    folder = make(tmp_path / "store", range(12))
    flip(data_of(folder), image(5).tobytes())
    done = export(folder, tmp_path / "out", "folder")
    assert (done.variants, done.damaged) == (11, 1)
    names = [f"{key(number).source_id.hex()}_{number % OF_SOURCE}.png" for number in range(12) if number != 5]
    assert list(pictures_of(tmp_path / "out")) == sorted(names)


def test_what_has_equal_names_is_chosen_by_its_generator(tmp_path):
    folder = make(tmp_path / "store", range(10))
    make(folder, range(4), fingerprint=OTHER)
    with pytest.raises(StoreError, match="several generators or parameters") as caught:
        export(folder, tmp_path / "out", "folder")
    assert f"{GENERATOR.hex()}/{PARAMETERS.hex()} (fingerprint {GENERATOR.hex()}, 10 variants)" in str(caught.value)
    with pytest.raises(StoreError, match="holds nothing of --generator abc; it holds "):
        export(folder, tmp_path / "out", "folder", generator="abc")
    assert not (tmp_path / "out").exists()
    assert export(folder, tmp_path / "out", "folder", generator=OTHER.hex()[:6]).variants == 4


def test_a_killed_export_leaves_no_folder_of_its_name_and_is_begun_again(tmp_path):
    folder = make(tmp_path / "store", range(3000), side=32)
    out, first = tmp_path / "out", tmp_path / ".out.exporting" / f"{key(0).source_id.hex()}_0.png"
    assert run_and_kill(["export", str(folder), str(out), "--format", "folder"], first, 0.05) == -signal.SIGKILL
    assert not out.exists()
    (tmp_path / ".out.exporting").mkdir(exist_ok=True)
    (tmp_path / ".out.exporting" / "rubbish.png").write_bytes(b"")
    assert export(folder, out, "folder").variants == 3000
    assert len(pictures_of(out)) == 3000
    assert "rubbish.png" not in pictures_of(out)
    assert not (tmp_path / ".out.exporting").exists()


def test_an_export_into_something_is_refused_and_an_empty_store_has_nothing(tmp_path):
    folder = make(tmp_path / "store", range(3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        export(folder, tmp_path / "full", "webdataset")
    with pytest.raises(StoreError, match="holds no variants"):
        export(make(tmp_path / "none", []), tmp_path / "out", "webdataset")
    (tmp_path / "empty").mkdir()
    export(folder, tmp_path / "empty", "webdataset")
    names = sorted(path.name for path in (tmp_path / "empty").iterdir())
    assert names == ["export.json", "variants-000000.tar", "variants.csv"]


# ---- import


@pytest.fixture
def paper(tmp_path):
    """A data set of two classes, and a folder of three variants of each of its images, laid out like the paper's."""
    for number, stem in enumerate(("a/n01_1", "a/n01_2", "b/n02_1")):
        for path, seed in [(f"data/{stem}.JPEG", number)] + [
            (f"made/{stem}_{k}.JPEG", 10 * number + k) for k in range(3)
        ]:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image(seed, 20).transpose(1, 2, 0)).save(tmp_path / path)
    return tmp_path


def import_all(paper: Path, **options):
    return import_folder(
        paper / "made", paper / "store", dataset_root=paper / "data", generator_name="icgan", licence="NC", **options
    )


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_an_imported_variant_is_the_decoded_file_of_the_source_of_its_stem(paper, encoding):
    assert import_all(paper, encoding=encoding).variants == 9
    fingerprint = hashlib.blake2b(b"icgan", digest_size=16).digest()
    assert foreign_fingerprint("icgan") == fingerprint
    with VariantStore(paper / "store", readonly=True) as store:
        for stem in ("a/n01_1", "a/n01_2", "b/n02_1"):
            source_id = StoredImage((paper / "data" / f"{stem}.JPEG").read_bytes(), "file").source_id
            for k in range(3):
                found = store.get(VariantKey(source_id, fingerprint, parameters_digest({}), k).digest())
                with Image.open(paper / "made" / f"{stem}_{k}.JPEG") as opened:
                    np.testing.assert_array_equal(found, np.asarray(opened).transpose(2, 0, 1))
        assert store.manifest.pinned == fingerprint.hex()
        assert store.manifest.generators[fingerprint.hex()].licence == "NC"
    assert verify(paper / "store").damage == []
    assert {format_[0] for format_ in statistics(paper / "store").formats} == {encoding}
    again = import_all(paper)
    assert (again.variants, again.present) == (0, 9)


def test_unknown_stems_are_named_and_counted_and_nothing_is_written(paper):
    for name in ("a/other_0.JPEG", "b/n02_1.JPEG"):
        shutil.copy(paper / "made" / "a" / "n01_1_0.JPEG", paper / "made" / name)
    with pytest.raises(DataError, match=r"2 of 11 images belong to none in .*, such as a/other_0.JPEG, b/n02_1.JPEG;"):
        import_all(paper)
    assert not (paper / "store").exists()
    done = import_all(paper, skip_unknown=True)
    assert (done.variants, done.unknown) == (9, 2)


def test_a_corrupt_image_is_named_and_left_out_and_imported_once_it_is_repaired(paper):
    broken = paper / "made" / "a" / "n01_2_1.JPEG"
    good = broken.read_bytes()
    broken.write_bytes(good[:200])
    done = import_all(paper)
    assert done.variants == 8
    (line,) = done.corrupt
    assert line.startswith(f"{broken}: the image is corrupt: ")
    broken.write_bytes(good)
    done = import_all(paper)
    assert (done.variants, done.present, done.corrupt) == (1, 8, [])


def test_stems_that_are_not_clear_and_variants_that_lie_twice_are_refused(paper):
    shutil.copy(paper / "data" / "a" / "n01_1.JPEG", paper / "data" / "b" / "n01_1.JPEG")
    assert import_all(paper).variants == 9  # folders of equal names tell them apart
    (paper / "made" / "a").rename(paper / "made" / "c")
    with pytest.raises(DataError, match=r"a/n01_1.JPEG and b/n01_1.JPEG have the same stem"):
        import_all(paper)
    (paper / "data" / "b" / "n01_1.JPEG").unlink()
    shutil.copy(paper / "made" / "c" / "n01_1_0.JPEG", paper / "made" / "c" / "n01_1_00.JPEG")
    with pytest.raises(DataError, match=r"n01_1_0.JPEG and c/n01_1_00.JPEG are both variant 0"):
        import_all(paper)


@pytest.mark.parametrize(("number", "fits"), [(2**64 - 1, True), (2**64, False), (10**40, False)])
def test_a_number_that_no_variant_can_have_is_refused_before_anything_is_written(paper, number, fits):
    path = paper / "made" / "a" / f"n01_1_{number}.JPEG"
    shutil.copy(paper / "made" / "a" / "n01_1_0.JPEG", path)
    if fits:
        assert import_all(paper).variants == 10
        return
    with pytest.raises(DataError, match=rf"a/n01_1_{number}.JPEG is numbered {number}; a number must be below 2\*\*64"):
        import_all(paper, skip_unknown=True)
    assert not (paper / "store").exists()


def test_what_is_no_regular_file_is_ignored_as_in_a_data_set(paper):
    for root, name in ((paper / "made", "n01_1_7.JPEG"), (paper / "data", "n01_7.JPEG")):
        os.mkfifo(root / "a" / name)  # reading it would wait for ever
        (root / "b" / name.replace("7", "8")).symlink_to("/dev/zero")
    assert import_all(paper).variants == 9


@pytest.mark.parametrize("root", ["made", "data"])
def test_links_that_loop_are_refused_and_leave_nothing(paper, root):
    (paper / root / "a" / "loop").symlink_to(paper / root)
    with pytest.raises(DataError, match=rf"{root}/a/loop is a link to a folder above it; remove the link"):
        import_all(paper)
    (paper / root / "a" / "loop").unlink()
    (paper / root / "a" / "self_0.JPEG").symlink_to("self_0.JPEG")
    with pytest.raises(DataError, match=rf"{root}/a/self_0.JPEG cannot be read \(Too many levels of symbolic links\)"):
        import_all(paper)
    assert not (paper / "store").exists()


def test_a_link_that_leads_nowhere_and_a_file_that_is_too_large_are_named_and_left_out(paper, monkeypatch):
    dangling, large = paper / "made" / "a" / "n01_1_7.JPEG", paper / "made" / "b" / "n02_1_0.JPEG"
    dangling.symlink_to(paper / "nowhere")
    monkeypatch.setattr("genssl.data.files.MAX_BYTES", 4096)
    large.write_bytes(large.read_bytes() + bytes(4096))
    done = import_all(paper)
    assert done.variants == 8
    assert [line.partition(": ")[0] for line in sorted(done.corrupt)] == [str(dangling), str(large)]
    assert "the limit is 4,096" in sorted(done.corrupt)[1]


def test_a_folder_that_cannot_be_read_is_refused_and_not_left_out(paper, monkeypatch):
    scandir = os.scandir

    def refused(path):  # root, who runs the tests here and there, may read everything
        if Path(path) == paper / "made" / "b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"made/b cannot be read \(Permission denied\); repair it or remove it"):
        import_all(paper)
    assert not (paper / "store").exists()


def test_a_store_of_another_generator_is_not_imported_into(paper):
    make(paper / "store", range(3))
    with pytest.raises(StoreError, match="variants of different generators must not be mixed"):
        import_all(paper)
