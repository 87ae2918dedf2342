"""Stores whose making a full disk stopped, at every point in turn: each is refused clearly and then taken up."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest

from genssl.training.supply.stores import refuse_foreign
from genssl.variants.store import writers as store_writers
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.store import VariantStore
from genssl.variants.store.writers import DATA, PAGE_BYTES, has_only_begun, is_cut_short, look_at_metas

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("left", [["store.lock"], ["store.lock", ".store.json.x7"], [".store.json.x7"]])
def test_what_a_full_disk_leaves_of_a_store_is_no_other_folder(tmp_path, left):
    for name in left:
        (tmp_path / name).touch()
    refuse_foreign(tmp_path, "--store")
    with pytest.raises(StoreError, match=r"has no store\.json"):
        VariantStore(tmp_path, readonly=True)
    VariantStore(tmp_path).close()
    refuse_foreign(tmp_path, "--store")


def test_anything_else_is_another_folder_still(tmp_path):
    (tmp_path / "store.lock").touch()
    (tmp_path / "thesis.tex").touch()
    for use in (lambda: refuse_foreign(tmp_path, "--store"), lambda: VariantStore(tmp_path)):
        with pytest.raises(StoreError, match="is not a variant store"):
            use()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.lock", "thesis.tex"]


TAKE_UP = """
import contextlib, errno, os, subprocess, sys
from pathlib import Path
import numpy as np
from genssl.variants.key import VariantKey
from genssl.variants.store.store import VariantStore
from genssl.variants.store.manifest import StoreError, foreign_to
from genssl.variants.store.scan import open_writers

KEY, IMAGE = VariantKey(b"s" * 16, b"g" * 16, b"p" * 16, 0), np.full((3, 8, 8), 7, np.uint8)

def begin(folder):
    try:
        VariantStore(folder).close()
    except StoreError as error:
        return str(error)

def take_up(folder):
    with contextlib.suppress(FileNotFoundError):
        assert foreign_to(folder) is None
    with VariantStore(folder) as store:
        assert store.put_many([(KEY, IMAGE)], strict=True) == 1
        assert (store.get(KEY.digest()) == IMAGE).all()
        assert store.damaged == 0
    with open_writers(folder) as writers:
        assert [writer.damage for writer in writers] == [None] * len(writers)
"""

# Python's own calls, refused one after another; what LMDB writes is refused by the small disk below.
CALLS = """
refused, calls = None, 0

def refuse(event, arguments):
    global calls
    if event in ("open", "os.mkdir", "os.rename", "os.chmod", "tempfile.mkstemp") and refused is not None:
        path = str(arguments[0])
        if path.startswith(str(place)):
            calls += 1
            if calls == refused:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

place = Path(sys.argv[1])
sys.addaudithook(refuse)
points = 0
while True:
    folder = place / str(points)
    refused, calls = points + 1, 0
    message = begin(folder)
    if calls < refused:
        break
    refused = None
    assert message is None or "No space left on device" in message, message
    points += message is not None or 1
    take_up(folder)
print(points)
"""

# On a file system with room for so many files, and for so many pages.
DISK = """
place, refusals = Path(sys.argv[1]), 0
for option, sizes in (("nr_inodes", range(2, 14)), ("size", range(4096, 16 * 4096, 4096))):
    for size in sizes:
        disk = place / f"{option}-{size}"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"{option}={size}"]
        subprocess.run([*mount, "none", disk], check=True)
        message = begin(disk / "store")
        assert message is None or "give a folder" in message, message
        refusals += message is not None
        subprocess.run(["mount", "-o", "remount,nr_inodes=1000,size=8m", disk], check=True)
        take_up(disk / "store")
print(refusals)
"""


def test_a_store_is_taken_up_wherever_its_making_was_refused(tmp_path):
    command = [sys.executable, "-c", TAKE_UP + CALLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8


def test_a_store_is_taken_up_when_a_full_disk_has_room_again(tmp_path):
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], check=False).returncode:
        pytest.skip("a small disk needs a user namespace, which this machine forbids")
    command = ["unshare", "-rm", sys.executable, "-c", TAKE_UP + DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8


def test_a_store_of_a_machine_with_smaller_pages_is_not_taken_for_one_cut_short(tmp_path, monkeypatch):
    writer = tmp_path / "writer"
    writer.mkdir()
    with lmdb.open(str(writer), max_dbs=2) as environment:
        environment.open_db(b"variants")
    monkeypatch.setattr("genssl.variants.store.writers.PAGE_BYTES", 16 * PAGE_BYTES)
    assert has_only_begun(writer, valid=False), "to this machine it is shorter than two pages"
    assert not is_cut_short(writer)
    assert look_at_metas(writer, 1) is None
    (writer / DATA).write_bytes((writer / DATA).read_bytes()[:PAGE_BYTES])
    assert is_cut_short(writer)


def test_a_file_system_without_hard_links_has_stores_too(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("genssl.variants.store.writers.os.link", refuse)
    with VariantStore(tmp_path / "store") as store:
        assert store.writer is not None
        assert len(store) == 0


def test_a_commit_between_two_looks_at_a_file_is_no_truncation(tmp_path, monkeypatch):
    writer = tmp_path / "writer"
    writer.mkdir()
    with lmdb.open(str(writer), max_dbs=2) as environment:
        table = environment.open_db(b"variants")
        metas = store_writers._metas

        def grown(data: Path) -> list[tuple[int, int, int]]:
            with environment.begin(write=True, db=table) as transaction:
                transaction.put(bytes(16), bytes(64 * PAGE_BYTES))
            return metas(data)

        monkeypatch.setattr(store_writers, "_metas", grown)
        assert look_at_metas(writer, 0) is None
