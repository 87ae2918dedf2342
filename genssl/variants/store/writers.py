"""The folders of a store's writers, and their files, looked at before LMDB maps them and believes every number in them.

data.mdb    LMDB's tree. Its two meta pages take turns, and the one of the later transaction counts; they have no
checksum.
lock.mdb    LMDB's readers.
writer.lock held by the process that writes here.
committed   how many records were committed. If the newer meta page is damaged the older counts, and the last commit
is gone without a word; if both are, everything is. Nothing is ever deleted from a tree, so this number
only grows. It is written after every commit and never synced: it costs a few microseconds, survives
kill -9 exactly, and after a power loss it is too low at worst.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Literal

import lmdb

from genssl.variants.store.manifest import StoreError

log = logging.getLogger(__name__)

WRITERS = "writers"
NETWORK_FILESYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "9p"),
    *("sshfs", "s3fs", "gcsfuse"),
}
# What becomes of variants that are to be stored: "full" has reached max_bytes, "failing" is tried again after a while.
StoreState = Literal["writing", "full", "failing", "gone"]
DATA, LOCK, COMMITTED, WRITER_LOCK = "data.mdb", "lock.mdb", "committed", "writer.lock"
LINE = re.compile(rb"(\d{20}) ([0-9a-f]{8})\n")  # the number and its CRC-32, of one length, so overwritten whole
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")  # LMDB's page, in files made on this kind of machine
# LMDB 0.9's page header and meta page: magic, page size (the first word of the first tree), last page, transaction
META = struct.Struct("<16xI20xI92xQQ")
META_MAGIC = 0xBEEFC0DE
SPARE_PAGES = 16
BEGUN_PAGES = 16  # a file with tables in it may be smaller, one that is still without them is
MAX_READERS, SLOT_BYTES = 1024, 64  # read transactions at once, over all processes
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without hard links


def writer_names(folder: Path) -> list[str]:
    """Returns the names of all environments that a store has, ascending."""
    try:
        return sorted(entry.name for entry in (folder / WRITERS).iterdir() if entry.is_dir())
    except OSError:
        return []


def network_filesystem(path: Path) -> str | None:
    """Returns the type of the network file system that a path lies on, or None, also where it cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    resolved = path.resolve()
    above = [mount for mount in mounts if resolved.is_relative_to(mount[1])]
    if not above:
        return None
    kind = max(above, key=lambda mount: len(mount[1]))[2].removeprefix("fuse.")
    return kind if kind in NETWORK_FILESYSTEMS else None


def read_committed(folder: Path) -> int | None:
    """Returns how many records at least were committed in a writer's folder.

    It is None if a genssl before this count has written there, or if the file is damaged.
    """
    try:
        match = LINE.fullmatch((folder / COMMITTED).read_bytes())
    except OSError:
        return None
    if match is None or zlib.crc32(match[1]) != int(match[2], 16):
        return None
    return int(match[1])


def write_committed(folder: Path, records: int) -> None:
    """Writes the number into a writer's folder; where the disk refuses, the number before stays, which is true too."""
    number = b"%020d" % records
    with suppress(OSError):
        descriptor = os.open(folder / COMMITTED, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, b"%s %08x\n" % (number, zlib.crc32(number)), 0)
        finally:
            os.close(descriptor)


def look_at_metas(folder: Path, committed: int) -> str | None:
    """Looks at a writer's tree before it is mapped; one that is absent or has no meta pages is as yet unwritten.

    Touching a mapped page beyond the end of a file kills the process with SIGBUS, and a tree that is believed to end
    earlier than it does is overwritten.

    Returns why it must not be written, though it may be read, or None; `committed` is how many records were committed,
    as far as is known. Raises lmdb.CorruptedError if the file is shorter than its tree, if the size of its pages is not
    clear, or if it is empty although something was committed.
    """
    data = folder / DATA
    size = _size(data)
    if size < 2 * PAGE_BYTES and not _is_whole_elsewhere(data, size):
        if committed:
            raise lmdb.CorruptedError(f"{data} is empty or gone: {committed:,} records were committed here")
        return None
    found = _metas(data)
    size = _size(data)  # after them: a writer's file grows before a meta page says so
    if {page for _, _, page in found} > {PAGE_BYTES}:
        raise lmdb.CorruptedError(f"{data} is damaged: its meta pages do not agree on the size of a page")
    ours = [meta for meta in found if meta[2] == PAGE_BYTES]  # none in a file of a machine with other pages
    missing = (max(ours)[1] + 1) * PAGE_BYTES - size if ours else 0
    # The last pages of a sound file may never have been written, if one commit took and freed them.
    if missing > SPARE_PAGES * PAGE_BYTES:
        raise lmdb.CorruptedError(f"{data} is truncated: {missing} bytes are missing at its end")
    # No commit shrinks a file: one that counts fewer pages than that before it is damaged, or it was not the later one.
    # Looked at twice, since a writer may have been at work on a page.
    if all(metas and max(metas)[1] < min(metas)[1] for metas in (found, _metas(data))):
        return "its meta pages do not agree on its latest commit"
    return None


def has_only_begun(folder: Path, *, valid: bool = True) -> bool:
    """Says whether nothing was committed in a tree yet: its writer is still making it, or died of that.

    With `valid` LMDB can use the meta pages, which are written at once, before anything else.
    """
    return not read_committed(folder) and _size(folder / DATA) < (BEGUN_PAGES if valid else 2) * PAGE_BYTES


def is_cut_short(folder: Path) -> bool:
    """Says whether a writer's tree has not even its meta pages, so that nothing can be in it."""
    return has_only_begun(folder, valid=False) and not _is_whole_elsewhere(folder / DATA, _size(folder / DATA))


def allocate_lock(folder: Path) -> None:
    """Makes LMDB's file of readers, if it is absent, with its blocks: raises OSError on a full disk.

    LMDB would make it sparse and map it, and touching a block that the disk cannot give kills the process with SIGBUS.
    """
    path = folder / LOCK
    if path.exists() or not hasattr(os, "posix_fallocate"):
        return
    temporary = path.with_name(f".{LOCK}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
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


def can_lock(folder: Path) -> bool:
    """Says whether a reader can register itself: not in a set that it may only read, which then must not be written."""
    path = folder / LOCK
    return os.access(path if path.exists() else folder, os.W_OK)


def _size(data: Path) -> int:
    return data.stat().st_size if data.exists() else 0


def _metas(data: Path) -> list[tuple[int, int, int]]:
    """Returns transaction, last page and page size of those meta pages that have the magic number."""
    with data.open("rb") as file:
        metas = []
        for page in (0, PAGE_BYTES):
            file.seek(page)
            metas.append(file.read(META.size))
    fields = [META.unpack(meta) for meta in metas if len(meta) == META.size]
    return [(transaction, last, page) for magic, page, last, transaction in fields if magic == META_MAGIC]


def _is_whole_elsewhere(data: Path, size: int) -> bool:
    """Says whether a file too short for two pages of this machine has those of a machine with smaller ones."""
    return size > 0 and any(page < PAGE_BYTES and size >= 2 * page for _, _, page in _metas(data))


class StorePlace:
    """Notices that a store's folder was deleted, moved or replaced: LMDB would go on writing into the lost files.

    It looks at `data`, a file in it that this process has open, so that no other can have its inode. `gone` says
    whether the file was not there when it was last looked for. Raises StoreError if it is not there now.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder, self._data = folder, data
        self.gone = False
        try:
            self._identity = _identity(data)
        except FileNotFoundError:  # a new folder with the inode of one that this process still has open
            raise StoreError(f"{folder} was deleted while this process has it open; close that store first") from None

    def look(self, *, strict: bool = False) -> bool:
        """Says whether the file is there, and logs it when that changes; with `strict` its loss is a StoreError."""
        was_gone = self.gone
        try:
            self.gone = _identity(self._data) != self._identity
        except OSError:  # also of a disk that has gone away, or does not answer
            self.gone = True
        what = f"{self._folder} was deleted, moved or replaced while this process had it open, or its disk is gone"
        if strict and self.gone:
            raise StoreError(f"{what}. Put it back, or start again with a new folder")
        if self.gone and not was_gone:
            log.error("%s; nothing more is stored, and variants are still served", what)
        elif was_gone and not self.gone:
            log.info("%s is back in its place, and written again", self._folder)
        return not self.gone


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
