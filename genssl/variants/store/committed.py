"""How many records a writer has committed, in the file `committed` beside its tree, so that lost ones are missed.

LMDB's two meta pages have no checksum. If the newer is damaged the older counts, and the last commit is gone without a
word; if both are, everything is. Nothing is ever deleted from a tree, so this number only grows. It is written after
every commit and never synced: it costs a few microseconds, survives kill -9 exactly, and after a power loss it is too
low at worst.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

COMMITTED = "committed"
LINE = re.compile(rb"(\d{20}) ([0-9a-f]{8})\n")  # the number and its CRC-32, of one length, so overwritten whole


def read_committed(folder: Path) -> int | None:
    """Returns how many records at least were committed in a writer's folder.

    Returns:
        None if that is not known: a genssl before this count has written there, or the file is damaged.
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
    try:
        descriptor = os.open(folder / COMMITTED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, b"%s %08x\n" % (number, zlib.crc32(number)), 0)
        finally:
            os.close(descriptor)
    except OSError:
        pass
