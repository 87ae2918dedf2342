"""One process at a time in a run directory."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from genssl.errors import UserError

NAME = ".lock"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Creates a run directory if need be, and holds it; the kernel lets go of it however the process ends.

    Raises:
        UserError: if it cannot be created, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be created ({error.strerror})") from None
    descriptor = _acquire(folder / NAME)
    if descriptor is None:
        raise UserError(
            f"{folder} is in use by another process{_owner(folder / NAME)}; wait until it has ended, or give another "
            "directory with --out"
        )
    try:
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)  # while it is still held; see _acquire
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
                    if not any(fnmatch(path.name, pattern) for pattern in own):
                        continue
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # not empty: another process has begun there
            for path in [] if stays else absent:
                path.rmdir()


def is_claimed(folder: Path) -> bool:
    """Says whether a process holds a run directory now."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _acquire(path: Path) -> int | None:
    """Returns a descriptor of the locked file; None if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder removes the file before it lets go: a lock on what has no name any more keeps nobody out.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"{path}: the run directory cannot be locked ({error.strerror}); give a directory on another file "
                "system with --out"
            ) from None
        os.close(descriptor)


def _owner(path: Path) -> str:
    try:
        return f" (number {int(path.read_text())})"
    except (OSError, ValueError):
        return ""
