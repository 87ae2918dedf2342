"""A private folder with a path short enough for a Unix socket; what killed runs have left is removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from genssl.base.files import lock
from genssl.config.address import LONGEST_SOCKET
from genssl.errors import UserError

PREFIX, MARKER, SOCKET = "genssl-", "genssl-embedded.lock", "server.sock"
OTHERS = ("/tmp", "/var/tmp")
RANDOM = "12345678"  # as many characters as mkdtemp adds


class SocketFolder:
    """A new folder that only this user can enter, locked until `close`, and by processes that inherit `descriptor`.

    Attributes:
        path: of the folder.
        descriptor: of the lock, which tells the folders of living runs from those of killed ones.

    Raises:
        UserError: if no folder for temporary files has a short enough path, or none can be written.
    """

    def __init__(self) -> None:
        for place in _places():
            _remove_leftovers(place)
        for place in _places():
            if len(os.fsencode(place / (PREFIX + RANDOM) / SOCKET)) > LONGEST_SOCKET:
                continue
            try:
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
            except OSError:
                continue
            try:
                self.descriptor = self._lock()
            except OSError:
                shutil.rmtree(self.path, ignore_errors=True)
                continue
            return
        room = LONGEST_SOCKET - len(f"/{PREFIX}{RANDOM}/{SOCKET}")
        raise UserError(
            f"TMPDIR: the embedded server needs a folder for its socket that can be written and whose path has at most "
            f"{room} bytes; {', '.join(map(str, _places()))} is none. Set TMPDIR to such a folder"
        )

    def _lock(self) -> int:
        # Under its name it appears locked: nobody can take it for a leftover in between.
        unnamed = self.path / ".lock"
        descriptor = lock(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        assert descriptor is not None, "nobody else enters this folder"
        try:
            unnamed.rename(self.path / MARKER)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        """Removes the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _places() -> list[Path]:
    """Returns folders for temporary files, those that the user has chosen first."""
    named = [tempfile.gettempdir(), *OTHERS, os.environ.get("XDG_RUNTIME_DIR", "")]
    return [Path(place) for place in dict.fromkeys(named) if place and Path(place).is_dir()]


def _remove_leftovers(place: Path) -> None:
    """Removes the folders whose process has ended: they are this user's, have our lock, and nobody holds it."""
    for folder in _own_folders(place):
        try:
            descriptor = lock(folder / MARKER, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        if descriptor is not None:  # its run has ended
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _own_folders(place: Path) -> Iterator[Path]:
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if (
                    entry.name.startswith(PREFIX)
                    and entry.is_dir(follow_symlinks=False)
                    and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
                ):
                    yield Path(entry.path)
    except OSError:
        return
