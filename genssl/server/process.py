"""A generation server in a process of its own, for as long as a run lasts, on a socket in a private folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from genssl.base.files import lock
from genssl.config.address import LONGEST_SOCKET
from genssl.config.server import ServerFile
from genssl.errors import ServerUnavailableError, UserError

START_SECONDS = 600.0
STOP_SECONDS = 10.0
PREFIX, MARKER, SOCKET = "genssl-", "genssl-embedded.lock", "server.sock"
OTHERS = ("/tmp", "/var/tmp")
RANDOM = "12345678"  # as many characters as mkdtemp adds
LOG_LINES = 20  # of a message: the log of a run that never began goes with its directory


class EmbeddedServer:
    """Starts `genssl serve-generator` on a private Unix socket, and ends it on every way out of the `with` block.

    If this process is killed, the server notices its standard input closing and ends by itself. The address of `file`
    is replaced; `log_path` gets the server's output (None: a file that goes with the server).

    Raises:
        UserError: if there is no folder for its socket.
    """

    def __init__(self, file: ServerFile, log_path: Path | None = None) -> None:
        self._own = SocketFolder()  # not in the run directory, whose path may be too long for a socket
        self._folder = self._own.path
        self.address = f"unix:{self._folder / SOCKET}"
        self.log_path = log_path or self._folder / "server.log"
        self._stopping = False
        try:
            self._process = self._start(file)
        except BaseException:
            self._own.close()
            raise

    def _start(self, file: ServerFile) -> subprocess.Popen[bytes]:
        server_file = self._folder / "server.yaml"
        content = file.model_dump(mode="json", exclude_none=True) | {"address": self.address}
        server_file.write_text(json.dumps(content, indent=2))  # JSON is YAML
        command = [sys.executable, "-m", "genssl", "serve-generator", str(server_file)]
        command += ["--address-file", str(self._folder / "address"), "--exit-with-stdin"]
        try:  # the run directory is made by the first rank of all, on its own machine
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            log_file = self.log_path.open("wb")
        except OSError as error:
            raise UserError(
                f"{self.log_path}: the embedded server's log cannot be written on this machine ({error.strerror}); "
                "give a run directory that can be made on every machine with --out"
            ) from None
        with log_file as log:
            # A session of its own: Ctrl-C reaches the trainer alone, which then ends the server in order.
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self._own.descriptor],  # if this process is killed, the folder is the server's to its end
            )

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def wait_until_bound(self) -> None:
        """Waits until the server accepts connections (it may still be loading).

        Raises:
            ServerUnavailableError: if it ends before that.
        """
        started = time.monotonic()
        while not (self._folder / "address").exists():
            self.check()
            if time.monotonic() - started > START_SECONDS:
                raise ServerUnavailableError(
                    f"the generation server did not start within {START_SECONDS:g} s. {self._end_of_log()}"
                )
            time.sleep(0.02)

    def check(self) -> None:
        """Raises ServerUnavailableError if the server process has ended."""
        code = self._process.poll()
        if code is None or self._stopping:
            return
        _, mark, said = self.log_path.read_text(errors="replace").rpartition("genssl: ")
        if code == 2 and mark:  # a user error of its own, such as a model that is not there
            raise UserError(said.strip())
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise ServerUnavailableError(
            f"the generation server of this run (process {self.pid} at {self.address}) {how}. Start the run again; "
            "if it happens again, start the server by itself with `genssl serve-generator FILE` and set "
            f"variants.server to its address. {self._end_of_log()}"
        )

    def _end_of_log(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()[-LOG_LINES:]
        said = "".join(f"\n    {line}" for line in lines) or " (empty)"
        return f"The end of its log ({self.log_path.name}):{said}"

    def stop(self) -> None:
        """Ends the server: politely, then not."""
        self._stopping = True
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=STOP_SECONDS)
        finally:  # also reached by a second Ctrl-C while waiting
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._own.close()


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
            with contextlib.suppress(OSError):
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
                try:
                    self.descriptor = self._lock()
                    return
                except OSError:
                    shutil.rmtree(self.path, ignore_errors=True)
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
    try:
        folders = list(place.glob(PREFIX + "*"))
    except OSError:
        return
    for folder in folders:
        try:
            if folder.lstat().st_uid != os.geteuid() or not stat.S_ISDIR(folder.lstat().st_mode):
                continue
            descriptor = lock(folder / MARKER, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        if descriptor is not None:  # its run has ended
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
