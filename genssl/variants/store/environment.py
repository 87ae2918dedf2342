"""One LMDB environment of a variant store: opened once a process, grown as it fills, never used across fork.

Durability. Every commit is synced (LMDB's default flags): a batch whose `put_many` returned survives both the death of
the process, since nothing is written through a writable map and the root is switched last, and a power loss, as far as
the disk honours fsync. The cheaper flags gain nothing that matters here: one sync a batch of 64 variants is far below
the time that a device takes to make them, and without it a power loss can corrupt the tree, not only lose its tail.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np

from genssl.base.files import lock as lock_file
from genssl.errors import fork_message
from genssl.variants.store import writers as files
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.record import digest_of, is_intact

log = logging.getLogger(__name__)

T = TypeVar("T")
Key = TypeVar("Key", bytes, tuple[bytes, bytes])  # of a scan
MAP_BYTES = 2**30  # address space, not disk: the file grows with what is written
DAMAGED = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.CursorFullError)  # what LMDB says of a tree that is
MISLED = "another variant's: a page of the tree is damaged"
RESIZES = 8  # another process may grow the map again while we follow
VERIFIED_SLOTS = 2**20  # 8 MB where they are all used; memory is taken as they fill


@dataclass(frozen=True)
class Entry:
    """What is written for one variant: its record under `digest`, and `link` in the list of its source."""

    digest: bytes
    record: bytes
    source_id: bytes
    link: bytes


class Environment:
    """Made by `Environment.open` only, which shares one object among all stores of a process.

    Thread-safe. Reads take `_map_lock` for as long as they copy, so that nobody moves the map under them; a commit
    waits for the disk outside of it.

    Attributes:
        variants, sources: LMDB's handles of the two databases, for `read`.
        verified: the records whose checksum this process has found right.
        loss: what is gone of that which was committed here, or may be, in words, or None.
    """

    # LMDB forbids opening a file twice in one process: closing either would drop the locks of both.
    _opened: dict[tuple[int, int], Environment] = {}  # noqa: RUF012
    _registry_lock = threading.Lock()

    def __init__(self, folder: Path, identity: tuple[int, int], *, writable: bool, map_bytes: int) -> None:
        self.folder, self.writable = folder, writable
        self.pid = os.getpid()
        self._identity, self._users = identity, 1
        self._map_lock, self._write_lock = threading.Lock(), threading.Lock()
        self._broken = False
        self.verified = VerifiedRecords()
        committed = files.read_committed(folder)  # before the tree, which another process may be writing
        self.loss = files.look_at_metas(folder, committed or 0)
        if writable and files.is_cut_short(folder):
            (folder / files.DATA).unlink(missing_ok=True)  # a full disk may have cut it short: LMDB would refuse it
        lock = writable or files.can_lock(folder)
        if lock:
            files.allocate_lock(folder)
        self._env: Any = lmdb.open(
            str(folder),
            map_size=map_bytes,
            max_dbs=2,
            max_readers=files.MAX_READERS,
            readonly=not writable,
            create=writable,
            readahead=False,  # reads are random
            lock=lock,
        )
        try:
            create = writable and files.has_only_begun(folder)  # never in place of tables that were lost
            self.variants = self._env.open_db(b"variants", create=create)
            self.sources = self._env.open_db(b"sources", create=create, dupsort=True, dupfixed=True)
            count = self.count()
            if count < (committed or 0):
                self.loss = f"of {committed:,} records that were committed here {count:,} are left"
            if writable:
                if self.loss is not None:
                    raise lmdb.CorruptedError(self.loss)
                self._env.reader_check()  # slots of killed readers would keep freed pages from being used again
                if committed is None:
                    files.write_committed(folder, count)
        except BaseException:
            self._env.close()
            raise

    @classmethod
    def open(cls, folder: Path, *, writable: bool, map_bytes: int = MAP_BYTES) -> Environment | None:
        """Opens `folder`, or shares what this process has open of it.

        Returns:
            None if it is to be read and nothing is complete there yet, or to be written but open here for reading.

        Raises:
            StoreError: in a forked child of a process that has it open.
            lmdb.Error: if it cannot be opened, or if it is to be written and has lost what was committed there:
                another commit would overwrite what may still be saved.
        """
        status = folder.stat()
        identity = (status.st_dev, status.st_ino)
        with cls._registry_lock:
            held = cls._opened.get(identity)
            if held is not None and held.pid != os.getpid():
                raise StoreError(fork_message(folder, held.pid))
            if held is not None:
                if writable and not held.writable:
                    return None
                held._users += 1
                return held
            if not writable and not (folder / files.DATA).exists() and not files.read_committed(folder):
                return None
            try:
                made = cls(folder, identity, writable=writable, map_bytes=map_bytes)
            except (lmdb.NotFoundError, lmdb.InvalidError) as error:
                if writable or not files.has_only_begun(folder, valid=isinstance(error, lmdb.NotFoundError)):
                    raise
                return None  # its writer is about to make it
            cls._opened[identity] = made
            return made

    def release(self) -> None:
        """Closes the environment when its last user has released it; does nothing in a forked child."""
        if self.pid != os.getpid():
            return
        with self._registry_lock:
            self._users -= 1
            if self._users:
                return
            # Closed under the registry's lock: LMDB refuses to open it again until it is.
            with self._write_lock, self._map_lock:
                del self._opened[self._identity]
                self._env.close()

    def get_many(self, digests: Sequence[bytes]) -> list[bytes | None]:
        """Returns copies of the records, None for those that are not here; raises lmdb.Error on a damaged tree."""

        def work(txn: Any) -> list[bytes | None]:
            get, variants = txn.get, self.variants
            # A copy of a view is made at half the cost of the copy that `get` itself would make.
            return [None if (view := get(digest, None, variants)) is None else bytes(view) for digest in digests]

        return self.read(work, buffers=True)

    def present(self, digests: Sequence[bytes]) -> list[bool]:
        """Says of every digest whether there is a record under it, unread; raises lmdb.Error on a damaged tree."""

        def work(txn: Any) -> list[bool]:
            cursor = txn.cursor(db=self.variants)
            return [cursor.set_key(digest) for digest in digests]

        return self.read(work)

    def count(self) -> int:
        """Returns the number of records."""
        return self.read(lambda txn: int(txn.stat(self.variants)["entries"]))

    def used_bytes(self) -> int:
        """Returns the size to which the file has grown."""

        def work(txn: Any) -> int:
            return (int(self._env.info()["last_pgno"]) + 1) * int(self._env.stat()["psize"])

        return self.read(work)

    def put_many(self, entries: Sequence[Entry]) -> int:
        """Writes what is not here intact already, in one transaction; returns how many were written.

        Raises:
            lmdb.CorruptedError: the tree is damaged, or leads to another variant's record; it must not be written then.
            lmdb.Error: disk full or an error of the disk. In either case nothing of the batch is stored.
        """
        with self._write_lock:
            for _ in range(64):  # each round doubles the map
                self._check()
                try:
                    with self._env.begin(write=True) as txn:
                        written = sum(self._put(txn, entry) for entry in entries)
                        count = int(txn.stat(self.variants)["entries"])
                    files.write_committed(self.folder, count)
                    return written
                except lmdb.MapFullError:
                    with self._map_lock:
                        self._resize(2 * int(self._env.info()["map_size"]))
                except lmdb.MapResizedError:  # an earlier writer of this environment, in another process, grew it
                    with self._map_lock:
                        self._resize(0)
        raise lmdb.MapFullError(f"{self.folder}: the address space is used up")

    def _put(self, txn: Any, entry: Entry) -> bool:
        held = txn.get(entry.digest, db=self.variants)
        if held is not None and digest_of(held) != entry.digest:
            # To replace it would free the pages of whatever it leads to.
            raise lmdb.CorruptedError(f"{self.folder}: record {entry.digest.hex()} is {MISLED}")
        if held is not None and is_intact(held):
            return False
        txn.put(entry.digest, entry.record, db=self.variants)
        txn.put(entry.source_id, entry.link, db=self.sources)
        return True

    def read(self, work: Callable[[Any], T], *, buffers: bool = False) -> T:
        """Returns `work` of a read transaction; with `buffers`, keys and values are views that end with it.

        Raises lmdb.Error if the tree is damaged, or if the map cannot follow its growth.
        """
        with self._map_lock:
            for attempt in range(RESIZES):
                self._check()
                try:
                    with self._env.begin(buffers=buffers) as txn:
                        return work(txn)
                except lmdb.MapResizedError:
                    if attempt == RESIZES - 1:
                        raise
                    self._resize(0)  # to the size that the writing process has written down
        raise AssertionError("the last attempt returns or raises")

    def _resize(self, size: int) -> None:
        try:
            self._env.set_mapsize(size)
        except lmdb.Error:
            # The old map is gone already: any further use would read unmapped memory.
            self._broken = True
            raise

    def _check(self) -> None:
        if self._broken:
            raise lmdb.Error(f"{self.folder}: its map was lost when it could not grow; the store must be opened again")


def in_order(found: list[Key], after: Key | None, folder: Path) -> list[Key]:
    """Returns keys as a scan found them behind `after`; raises lmdb.CorruptedError if they do not ascend.

    The tree is damaged then, and a scan could go round in it for ever.
    """
    keys: list[Key] = [] if after is None else [after]
    for one, following in itertools.pairwise(keys + found):
        if following <= one:
            raise lmdb.CorruptedError(f"{folder}: the records are not in order: a page of the tree is damaged")
    return found


def _new_registry_lock() -> None:
    Environment._registry_lock = threading.Lock()


# Another thread may have held it at the fork; the child must get its StoreError, not a deadlock.
os.register_at_fork(after_in_child=_new_registry_lock)


def take_writer(folder: Path, map_bytes: int) -> tuple[str, Environment, int]:
    """Takes an environment that nobody writes, or a new one.

    Returns its name, the environment, and the descriptor that holds the lock: closing it gives the environment back.
    Raises StoreError if the folder cannot be written.
    """
    host = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "host"
    existing = files.writer_names(folder)
    # On a network file system other machines' locks may not be seen: only this machine's own are taken over.
    on_network = files.network_filesystem(folder) is not None
    usable = [name for name in existing if not on_network or name.rpartition("-")[0] == host]
    fresh = (name for number in itertools.count() if (name := f"{host}-{number:03d}") not in existing)
    try:
        for name in itertools.chain(usable, fresh):
            place = folder / files.WRITERS / name
            place.mkdir(parents=True, exist_ok=True)
            descriptor = lock_file(place / files.WRITER_LOCK)
            if descriptor is None:
                continue
            environment = None
            try:
                environment = Environment.open(place, writable=True, map_bytes=map_bytes)
            except lmdb.Error as error:
                if name not in existing:
                    raise
                log.warning("%s cannot be written: %s; another is taken", place, error)
            finally:
                if environment is None:
                    os.close(descriptor)
            if environment is not None:
                return name, environment, descriptor
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"{folder} cannot be written ({error}); make room or give a folder on a local disk") from None
    raise AssertionError("there is always another name")


class VerifiedRecords:
    """Which records this process has verified, so that a checksum is computed once and not per read.

    Every digest has one slot, told by its first half, which holds its second half, mixed with a hash of the record that
    was verified under it: a digest is not known for the record of another variant, to which a damaged tree may lead
    later. Two digests that share a slot drive each other out and are verified again, so a set that is larger than the
    table is served more slowly and no less surely; what was not verified passes with a probability of 2**-63.

    Threads may use one table at once: a lost entry is verified again.

    Args:
        slots: a power of two.
    """

    def __init__(self, slots: int = VERIFIED_SLOTS) -> None:
        assert slots & (slots - 1) == 0, "the slot is some bits of the digest"
        self._mask = np.uint64(slots - 1)
        self._seconds = np.zeros(slots, np.uint64)

    def known(self, digests: Sequence[bytes], hashes: Sequence[int]) -> list[bool]:
        """Says of every digest (16 bytes) whether it was added with this hash of a record (64 bits, signed)."""
        slots, seconds = self._split(digests, hashes)
        known: list[bool] = (self._seconds[slots] == seconds).tolist()
        return known

    def add(self, digests: Sequence[bytes], hashes: Sequence[int]) -> None:
        """Enters digests of 16 bytes, each with a hash of its record."""
        slots, seconds = self._split(digests, hashes)
        self._seconds[slots] = seconds

    def _split(self, digests: Sequence[bytes], hashes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        # An empty slot is 0, which nothing that is entered may equal.
        mixed = halves[:, 1] ^ np.array(hashes, np.int64).view(np.uint64)
        return halves[:, 0] & self._mask, mixed | np.uint64(1)
