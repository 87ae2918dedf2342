"""One LMDB environment of a variant store: opened once a process, grown as it fills, never used across fork.

Durability. Every commit is synced (LMDB's default flags): a batch whose `put_many` returned survives both the death of
the process, since nothing is written through a writable map and the root is switched last, and a power loss, as far as
the disk honours fsync. The cheaper flags gain nothing that matters here: one sync a batch of 64 variants is far below
the time that a device takes to make them, and without it a power loss can corrupt the tree, not only lose its tail.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import lmdb

from genssl.errors import fork_message
from genssl.variants.store.committed import read_committed, write_committed
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.meta import DATA, has_only_begun, is_cut_short, look_at_metas
from genssl.variants.store.record import digest_of, is_intact
from genssl.variants.store.verified import VerifiedRecords

T = TypeVar("T")
Key = TypeVar("Key", bytes, tuple[bytes, bytes])  # of a scan
LOCK = "lock.mdb"
MAX_READERS, SLOT_BYTES = 1024, 64  # read transactions at once, over all processes
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without hard links
MAP_BYTES = 2**30  # address space, not disk: the file grows with what is written
DAMAGED = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.CursorFullError)  # what LMDB says of a tree that is
MISLED = "another variant's: a page of the tree is damaged"
RESIZES = 8  # another process may grow the map again while we follow


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
        committed = read_committed(folder)  # before the tree, which another process may be writing
        self.loss = look_at_metas(folder, committed or 0)
        if writable and is_cut_short(folder):
            (folder / DATA).unlink(missing_ok=True)  # a full disk may have cut it short: LMDB would refuse it
        lock = writable or _can_lock(folder)
        if lock:
            _allocate_lock(folder / LOCK)
        self._env: Any = lmdb.open(
            str(folder),
            map_size=map_bytes,
            max_dbs=2,
            max_readers=MAX_READERS,
            readonly=not writable,
            create=writable,
            readahead=False,  # reads are random
            lock=lock,
        )
        try:
            create = writable and has_only_begun(folder)  # never in place of tables that were lost
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
                    write_committed(folder, count)
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
            if not writable and not (folder / DATA).exists() and not read_committed(folder):
                return None
            try:
                made = cls(folder, identity, writable=writable, map_bytes=map_bytes)
            except (lmdb.NotFoundError, lmdb.InvalidError) as error:
                if writable or not has_only_begun(folder, valid=isinstance(error, lmdb.NotFoundError)):
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

    def links(self, source_id: bytes) -> list[bytes]:
        """Returns the links of a source, in ascending order; raises lmdb.Error on a damaged tree."""

        def work(txn: Any) -> list[bytes]:
            cursor = txn.cursor(db=self.sources)
            return [bytes(link) for link in cursor.iternext_dup()] if cursor.set_key(source_id) else []

        return in_order(self.read(work), None, self.folder)

    def present(self, digests: Sequence[bytes]) -> list[bool]:
        """Says of every digest whether there is a record under it, unread; raises lmdb.Error on a damaged tree."""

        def work(txn: Any) -> list[bool]:
            cursor = txn.cursor(db=self.variants)
            return [cursor.set_key(digest) for digest in digests]

        return self.read(work)

    def digests(self, after: bytes, limit: int) -> list[bytes]:
        """Returns up to `limit` digests above `after`, ascending: a scan in short transactions, which pin no pages."""

        def work(txn: Any) -> list[bytes]:
            cursor = txn.cursor(db=self.variants)
            found: list[bytes] = []
            valid = cursor.set_range(after + b"\0") if after else cursor.first()
            while valid and len(found) < limit:
                found.append(bytes(cursor.key()))
                valid = cursor.next()
            return found

        return in_order(self.read(work), after, self.folder)

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
                    write_committed(self.folder, count)
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

        Raises:
            lmdb.Error: if the tree is damaged, or the map cannot follow its growth.
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
    """Returns keys as a scan found them behind `after`.

    Raises:
        lmdb.CorruptedError: if they do not ascend: the tree is damaged, and a scan could go round in it for ever.
    """
    keys: list[Key] = [] if after is None else [after]
    for one, following in pairwise(keys + found):
        if following <= one:
            raise lmdb.CorruptedError(f"{folder}: the records are not in order: a page of the tree is damaged")
    return found


def _new_registry_lock() -> None:
    Environment._registry_lock = threading.Lock()


# Another thread may have held it at the fork; the child must get its StoreError, not a deadlock.
os.register_at_fork(after_in_child=_new_registry_lock)


def _allocate_lock(path: Path) -> None:
    """Makes the file of reader slots, if it is absent, with its blocks: raises OSError on a full disk.

    LMDB would make it sparse and map it, and touching a block that the disk cannot give kills the process with SIGBUS.
    """
    if path.exists() or not hasattr(os, "posix_fallocate"):
        return
    temporary = path.with_name(f".{LOCK}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, (MAX_READERS + 2) * SLOT_BYTES)  # the slots and LMDB's header
        os.link(temporary, path)  # unlike a rename, fails where another process was first
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise  # the disk is full
    finally:
        os.close(descriptor)
        temporary.unlink()


def _can_lock(folder: Path) -> bool:
    """Says whether a reader can register itself: not in a set that it may only read, which then must not be written."""
    path = folder / LOCK
    return os.access(path if path.exists() else folder, os.W_OK)
