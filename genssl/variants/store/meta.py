"""What the two meta pages of an LMDB file say, read before LMDB maps the file and believes every number.

They take turns, and the one of the later transaction counts. They have no checksum.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import lmdb

from genssl.variants.store.committed import read_committed

DATA = "data.mdb"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")  # LMDB's page, in files made on this kind of machine
# LMDB 0.9's page header and meta page: magic, page size (the first word of the first tree), last page, transaction
META = struct.Struct("<16xI20xI92xQQ")
META_MAGIC = 0xBEEFC0DE
SPARE_PAGES = 16
BEGUN_PAGES = 16  # a file with tables in it may be smaller, one that is still without them is


def look_at_metas(folder: Path, committed: int) -> str | None:
    """Looks at a writer's file before it is mapped; one that is absent or has no meta pages is as yet unwritten.

    Touching a mapped page beyond the end of a file kills the process with SIGBUS, and a tree that is believed to end
    earlier than it does is overwritten.

    Args:
        folder: of the writer.
        committed: how many records were, as far as is known.

    Returns:
        Why it must not be written, though it may be read; None if nothing seems to be wrong.

    Raises:
        lmdb.CorruptedError: if the file is shorter than its tree, if the size of its pages is not clear, or if it is
            empty although something was committed.
    """
    data = folder / DATA
    size = data.stat().st_size if data.exists() else 0
    if size < 2 * PAGE_BYTES and not _is_whole_elsewhere(data, size):
        if committed:
            raise lmdb.CorruptedError(f"{data} is empty or gone: {committed:,} records were committed here")
        return None
    found = _metas(data)
    size = data.stat().st_size  # after them: a writer's file grows before a meta page says so
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


def _metas(data: Path) -> list[tuple[int, int, int]]:
    """Returns transaction, last page and page size of the meta pages that are some."""
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


def is_cut_short(folder: Path) -> bool:
    """Says whether a writer's file has not even its meta pages, so that nothing can be in it."""
    data = folder / DATA
    return has_only_begun(folder, valid=False) and not (
        data.exists() and _is_whole_elsewhere(data, data.stat().st_size)
    )


def has_only_begun(folder: Path, *, valid: bool = True) -> bool:
    """Says whether nothing was committed in a file yet: its writer is still making it, or died of that.

    Args:
        folder: of the writer.
        valid: whether LMDB can use the meta pages, which are written at once, before anything else.
    """
    size = (folder / DATA).stat().st_size if (folder / DATA).exists() else 0
    return not read_committed(folder) and size < (BEGUN_PAGES if valid else 2) * PAGE_BYTES
