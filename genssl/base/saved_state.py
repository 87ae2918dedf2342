"""Files of `torch.save` that carry a digest of their bytes.

`torch.load` looks at none of the checksums in such a file, and these cover neither the names nor the places of its
parts. The digest stands in the comment at the end of the zip archive, which `torch.load` passes over.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from genssl.base.files import write_atomically

MARK = b"genssl BLAKE2b-128 "
COMMENT = len(MARK) + 32


class DamagedError(Exception):
    """A file that cannot be read, or is not what was written."""


def write_state(path: Path, state: Any) -> None:
    """Writes what `torch.load(weights_only=True)` reads, whole or not at all; a crash leaves the old file or none.

    Raises:
        OSError, RuntimeError: if it cannot be written; torch reports a full disk as the latter.
    """

    def write(partial: Path) -> None:
        with partial.open("wb+") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)
            file.write(COMMENT.to_bytes(2, "little"))
            digest = _digest(file, file.tell())
            file.write(MARK + digest)

    write_atomically(path, write, synced=True)


def read_state(path: Path) -> Any:
    """Returns what `write_state` was given, its tensors on the CPU; or what an older file, without a digest, holds.

    Raises:
        DamagedError: if the file is cut short, has other bytes than were written, or is of another kind.
    """
    try:
        if not check_digest(path):
            with zipfile.ZipFile(path) as archive:
                _check_parts(archive)
                if archive.comment:
                    raise DamagedError("its digest is not readable")
        return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except Exception as error:  # whatever a half-written or foreign file makes zipfile, pickle and torch raise
        raise DamagedError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def check_digest(path: Path) -> bool:
    """Says whether a file carries a digest of `write_state`, with which it then agrees.

    Raises:
        OSError: if it cannot be read.
        DamagedError: if it has other bytes than were written.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - COMMENT))
        end = file.read()
        if not end.startswith(MARK):
            return False
        if end != MARK + _digest(file, size - COMMENT):
            with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
                _check_parts(archive)  # says which part it is, if it can
            raise DamagedError("its digest is wrong")
    return True


def _check_parts(archive: zipfile.ZipFile) -> None:
    if (broken := archive.testzip()) is not None:
        raise DamagedError(f"the checksum of {broken} is wrong")


def _digest(file: BinaryIO, size: int) -> bytes:
    """Returns 32 hex digits of the first `size` bytes of a file, behind which the file then stands."""
    digest, left = hashlib.blake2b(digest_size=16), size
    file.seek(0)
    while left > 0 and (block := file.read(min(left, 2**22))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()
