"""Whether a store that a process has open for writing still lies where it was opened."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from genssl.variants.store.manifest import StoreError

log = logging.getLogger(__name__)

# What becomes of variants that are to be stored: "full" has reached max_bytes, "failing" is tried again after a while.
StoreState = Literal["writing", "full", "failing", "gone"]


class StorePlace:
    """Notices that a store's folder was deleted, moved or replaced: LMDB would go on writing into the lost files.

    Args:
        folder: of the store.
        data: the file in it that this process has open, so that no other can have its inode.

    Attributes:
        gone: whether the file was not there when it was last looked for.

    Raises:
        StoreError: if it is not there now.
    """

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder, self._data = folder, data
        self.gone = False
        try:
            self._identity = _identity(data)
        except FileNotFoundError:  # a new folder with the inode of one that this process still has open
            raise StoreError(f"{folder} was deleted while this process has it open; close that store first") from None

    def look(self, *, strict: bool = False) -> bool:
        """Says whether the file is there; when that changes, it is logged.

        Raises:
            StoreError: with `strict`, if it is not.
        """
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
