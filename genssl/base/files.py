"""Files and folders that appear whole, and locks that the kernel drops when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from genssl.errors import UserError

RUN_LOCK = ".lock"


def write_atomically(
    path: Path, write: Callable[[Path], object], *, synced: bool = False, shared: bool = False
) -> None:
    """Calls `write` with a temporary path and moves the result to `path`; a crash leaves the old file or none.

    Args:
        path: of the file.
        write: what writes it.
        synced: the content reaches the disk before the name does, so that a power loss leaves no empty file.
        shared: other processes may write this file at the same time.
    """
    partial = path.with_name(f".{path.name}.{f'{secrets.token_hex(4)}.' if shared else ''}part")
    try:
        write(partial)
        if synced:
            sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON (which is YAML too)."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text))


def sync(path: Path) -> None:
    """Gives a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(
    path: Path, flags: int = os.O_RDWR | os.O_CREAT, *, mode: int = 0o644, wait: bool = False, exclusive: bool = True
) -> int | None:
    """Opens a file or folder and locks it; an exclusive lock keeps all others out, another one exclusive ones.

    A file that it makes gets `mode`, less the umask.

    Returns the descriptor, which has the lock until it is closed; None if another process has it, unless it is waited
    for. Raises OSError if it cannot be opened, or if its file system has no locks.
    """
    descriptor = os.open(path, flags, mode)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


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
        descriptor = lock(place, os.O_RDONLY | os.O_DIRECTORY)
        if descriptor is None:
            raise UserError(f"{out} is being written by another process; wait for it, or stop it")
        try:
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
        sync(out.parent)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error}); make room or give a folder on another disk, and start again"
        ) from None


def empty(folder: Path) -> None:
    """Removes everything in a folder, but not the folder, on which a lock may be held."""
    for entry in folder.iterdir():
        _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes a run directory if need be, and holds it for this process alone; raises UserError if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be created ({error.strerror})") from None
    descriptor = _lock_named(folder / RUN_LOCK)
    if descriptor is None:
        raise UserError(
            f"{folder} is in use by another process{_holder(folder / RUN_LOCK)}; wait until it has ended, or give "
            "another directory with --out"
        )
    try:
        yield
    finally:
        (folder / RUN_LOCK).unlink(missing_ok=True)  # while it is still held; see _lock_named
        os.close(descriptor)


@contextmanager
def provisional(folder: Path, begun: Callable[[], bool], own: Collection[str]) -> Iterator[None]:
    """Claims a directory, and leaves it as it was, or absent, unless something has begun there.

    Args:
        folder: made if need be.
        begun: asked at the end; if it says no, what has come into the directory meanwhile is removed.
        own: patterns of the names that are removed, since others may have put something there, too.

    Raises:
        UserError: as `claim`.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    stays = False
    try:
        with claim(folder):
            before = set(folder.iterdir())
            try:
                yield
            finally:
                stays = begun()
                for path in set() if stays else set(folder.iterdir()) - before:
                    if any(fnmatch(path.name, pattern) for pattern in own):
                        with suppress(OSError):
                            _remove(path)
    finally:
        with suppress(OSError):  # not empty: another process has begun there
            for path in [] if stays else absent:
                path.rmdir()


def is_claimed(folder: Path) -> bool:
    """Says whether a process holds a run directory now."""
    try:
        descriptor = lock(folder / RUN_LOCK, os.O_RDONLY, exclusive=False)
    except OSError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _lock_named(path: Path) -> int | None:
    """Returns a descriptor of the locked file, which says this process's number; None if another process has it."""
    while True:
        descriptor = None
        try:
            descriptor = lock(path)
            if descriptor is None:
                return None
            # A holder removes the file before it lets go: a lock on what has no name any more keeps nobody out.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                    return descriptor
            os.close(descriptor)
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            raise UserError(
                f"{path}: the run directory cannot be locked ({error.strerror}); give a directory on another file "
                "system with --out"
            ) from None


def _holder(path: Path) -> str:
    try:
        return f" (number {int(path.read_text())})"
    except (OSError, ValueError):
        return ""
