"""Folders that commands name themselves, by the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from genssl.errors import UserError


@contextmanager
def new_folder(parent: Path, name: str) -> Iterator[Path]:
    """Makes PARENT/NAME-DATE-TIME, which no other process has made; takes it away again if it ends up empty.

    Of those that begin within a second the later ones get a number behind it.

    Raises:
        UserError: if it cannot be made.
    """
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    made_parent = not parent.exists()
    for number in count(1):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            if folder.parent.is_dir():
                continue
            raise UserError(f"{folder}: cannot be created ({parent} is a file); give a directory with --out") from None
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be created ({error.strerror}); give another directory with --out"
            ) from None
    try:
        yield folder
    finally:
        with suppress(OSError):  # not empty: what is there stays
            folder.rmdir()
            if made_parent:
                parent.rmdir()
