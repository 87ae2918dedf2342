"""A store whose folder is deleted, moved or replaced under the process that writes it."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genssl.variants.key import VariantKey
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.store import VariantStore
from genssl.variants.store.writers import StorePlace

MAKE = """
import sys
from pathlib import Path
from genssl.variants.store.store import VariantStore
VariantStore(Path(sys.argv[1])).close()
"""


def item(number: int):
    return VariantKey(b"s" * 16, b"g" * 16, b"p" * 16, number), np.full((3, 8, 8), number, np.uint8)


@pytest.fixture
def store(tmp_path):
    with VariantStore(tmp_path / "store") as store:
        assert store.put_many([item(0)]) == 1
        yield store


def told(caplog) -> list[tuple[int, str]]:
    return [
        (record.levelno, record.getMessage())
        for record in caplog.records
        if record.name == "genssl.variants.store.writers"
    ]


def test_a_deleted_folder_is_told_once_and_neither_written_nor_made_anew(store, caplog):
    shutil.rmtree(store.folder)
    assert [store.put_many([item(number)]) for number in (1, 2, 3)] == [0, 0, 0]
    assert store.state == "gone"
    ((level, message),) = told(caplog)
    assert level == logging.ERROR
    assert message.startswith(f"{store.folder} was deleted, moved or replaced while this process had it open")
    assert not store.folder.exists()
    assert len(store) == 1, "nothing went into the lost file"
    assert store.get(item(0)[0].digest()) is not None, "what is still mapped may be read"


def test_a_folder_that_another_store_has_replaced_is_left_to_that(store, caplog):
    shutil.rmtree(store.folder)
    subprocess.run([sys.executable, "-c", MAKE, str(store.folder)], check=True)
    assert store.put_many([item(1)]) == 0
    assert store.state == "gone"
    assert len(told(caplog)) == 1
    with VariantStore(store.folder, readonly=True) as other:
        assert other.manifest.generators == {}, "nor is its manifest changed"


def test_a_folder_that_comes_back_is_written_again(store, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    store.folder.rename(tmp_path / "away")
    assert not store.look()
    assert store.put_many([item(1)]) == 0
    (tmp_path / "away").rename(store.folder)
    assert store.put_many([item(1)]) == 1
    assert store.state == "writing"
    assert [level for level, _ in told(caplog)] == [logging.ERROR, logging.INFO]


def test_a_writer_for_its_own_sake_ends_with_an_error(store):
    shutil.rmtree(store.folder)
    with pytest.raises(StoreError, match="Put it back, or start again with a new folder"):
        store.put_many([item(1)], strict=True)


def test_a_deletion_during_the_commit_is_not_taken_for_success(store, monkeypatch):
    write = store._own.put_many

    def delete_first(entries):
        shutil.rmtree(store.folder)
        return write(entries)

    monkeypatch.setattr(store._own, "put_many", delete_first)
    assert store.put_many([item(1)]) == 0
    assert store.state == "gone"


def test_a_store_of_the_same_name_can_be_made_by_a_new_process_only_or_after_closing(tmp_path):
    folder: Path = tmp_path / "store"
    with VariantStore(folder) as store:
        shutil.rmtree(folder)
        with contextlib.suppress(StoreError):  # where the file system gives the new folder the old one's inode
            VariantStore(folder).close()
        assert not store.look()
    with VariantStore(folder) as store:
        assert store.put_many([item(0)]) == 1


def test_a_disk_that_does_not_answer_is_a_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "data.mdb").touch()
    place = StorePlace(tmp_path, tmp_path / "data.mdb")

    def unanswered(_: Path) -> tuple[int, int]:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    with monkeypatch.context() as patched:
        patched.setattr("genssl.variants.store.writers._identity", unanswered)
        assert not place.look()
        with pytest.raises(StoreError, match="its disk is gone"):
            place.look(strict=True)
    assert place.look()
