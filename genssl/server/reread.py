"""Files that are replaced while the server runs: certificates and tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

REREAD_SECONDS = 10.0


class Refreshable(Protocol):
    """What reads files of its own."""

    def refresh(self) -> None:
        """Reads them if they have changed; keeps what it has if they cannot be used."""
        ...


class FileStamps:
    """Tells whether files were changed or replaced since it was last asked; links are followed.

    Args:
        paths: of the files; they may be absent.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self._look()

    def changed(self) -> bool:
        """Says whether any file is another than at the last call, or, at the first, than when this was made."""
        before, self._seen = self._seen, self._look()
        return self._seen != before

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


async def keep_rereading(files: Sequence[Refreshable], seconds: float = REREAD_SECONDS) -> None:
    """Refreshes again and again, in a thread, until cancelled; start it as a task."""
    while True:
        await asyncio.sleep(seconds)
        for each in files:
            try:
                await asyncio.to_thread(each.refresh)
            except Exception:  # the next replacement must still be seen
                log.exception("a file could not be read anew")
