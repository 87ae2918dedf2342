"""A folder that appears under its name only when it is finished."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genssl.errors import UserError


@contextmanager
def finished_at_once(out: Path, doing: str, *, keep: bool = False) -> Iterator[Path]:
    """Yields the folder `.OUT.DOING` beside `out`, and gives it the name `out` when the block ends without an error.

    Args:
        out: absent or an empty folder.
        doing: the word in the folder's name while it is written.
        keep: the block goes on with what an earlier, interrupted call has left. Otherwise that is removed.

    Raises:
        UserError: if `out` holds something, if another process writes it now, or if the disk refuses.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; give a new folder, or remove it")
    place = out.with_name(f".{out.name}.{doing}")
    try:
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{out} is being written by another process; wait for it, or stop it") from None
            if not keep:
                empty(place)
            try:
                yield place
            except BaseException:
                if not keep:
                    shutil.rmtree(place, ignore_errors=True)
                raise
            os.fsync(descriptor)
            os.replace(place, out)
        finally:
            os.close(descriptor)
        _sync(out.parent)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}); make room or give a folder on another disk, and start again"
        ) from None


def empty(folder: Path) -> None:
    """Removes everything in a folder, but not the folder, on which a lock may be held."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file that survives a power loss."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
