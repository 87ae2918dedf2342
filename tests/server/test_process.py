"""The embedded server ends with its run, however the run ends, and so does the folder of its socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from genssl.config.server import ServerFile
from genssl.errors import ServerUnavailableError, UserError
from genssl.generators.configs import StableUnCLIPConfig
from genssl.server import process
from genssl.server.process import MARKER, SOCKET, EmbeddedServer, SocketFolder

FILE = ServerFile(
    threads=1, buckets=[1], generators=[StableUnCLIPConfig(model="builtin:digits-unclip", num_inference_steps=1)]
)

PARENT = """
import sys, time
from pathlib import Path
from tests_file import FILE
from genssl.server.process import EmbeddedServer
server = EmbeddedServer(FILE, Path(sys.argv[1]))
server.wait_until_bound()
print(server.pid, server.address, flush=True)
time.sleep(600)
"""

HOLD = """
import subprocess, sys, time
from genssl.server.process import SocketFolder
folder = SocketFolder()
command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
child = subprocess.Popen(command, pass_fds=[folder.descriptor], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, folder.path, flush=True)
time.sleep(600)
"""


def gone(pid: int, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def check_until_it_raises(server: EmbeddedServer) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        server.check()
        time.sleep(0.05)


def test_the_server_ends_with_the_block_and_leaves_nothing(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))  # TMPDIR; longer than a socket's path may be
    with EmbeddedServer(FILE, tmp_path / "not" / "there" / "yet" / "log") as server:
        server.wait_until_bound()
        socket = Path(server.address.removeprefix("unix:"))
        assert socket.stat().st_mode & 0o077 == 0, "only the owner may connect"
        server.check()
    assert gone(server.pid, 1)
    assert not socket.parent.exists()


@pytest.mark.slow
def test_the_server_ends_when_the_block_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), EmbeddedServer(FILE, tmp_path / "log") as server:
        raise ZeroDivisionError
    assert gone(server.pid, 1)


def test_the_server_notices_that_its_parent_was_killed(tmp_path):
    (tmp_path / "tests_file.py").write_text(Path(__file__).read_text().split("PARENT =")[0])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid, address = parent.stdout.readline().split()
        pid = int(pid)
        parent.send_signal(signal.SIGKILL)
    assert gone(pid)
    folder = Path(address.removeprefix("unix:")).parent
    assert folder.exists()
    ends = time.monotonic() + 30  # its threads may end a moment after it
    while folder.exists():
        assert time.monotonic() < ends
        SocketFolder().close()  # as the next run does


def test_a_killed_server_is_reported_with_its_address_and_its_log(tmp_path):
    with EmbeddedServer(FILE, tmp_path / "log") as server:
        server.wait_until_bound()
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerUnavailableError) as caught:
            check_until_it_raises(server)
    message = str(caught.value)
    for words in (server.address, "killed by signal 9", "Start the run again", "its log (log)", "listening on"):
        assert words in message


def test_a_mistake_of_the_users_comes_back_as_its_message_alone(tmp_path):
    file = FILE.model_copy(update={"generators": [StableUnCLIPConfig(model="builtin:nothing")]})
    with (
        EmbeddedServer(file, tmp_path / "log") as server,
        pytest.raises(UserError, match=r"^generator.model: there is no built-in model 'nothing'"),
    ):
        check_until_it_raises(server)


def test_a_log_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    before = set(Path(tempfile.gettempdir()).glob("genssl-*"))
    with pytest.raises(UserError, match=r"file/log: the embedded server's log cannot be written on this machine"):
        EmbeddedServer(FILE, tmp_path / "file" / "log")
    assert set(Path(tempfile.gettempdir()).glob("genssl-*")) <= before


# The folder of the socket


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Stands for the machine's folders for temporary files, the first being TMPDIR."""
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places[0]))
    monkeypatch.setattr(process, "OTHERS", (str(places[1]),))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return places


def long(place: Path) -> Path:
    folder = place / ("x" * 90)
    folder.mkdir()
    return folder


def test_it_is_private_and_goes_with_its_user(places):
    folder = SocketFolder()
    assert folder.path.parent == places[0]
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.close()
    folder.close()
    assert not list(places[0].iterdir())


def test_a_long_tmpdir_falls_back_to_a_short_folder(places, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(long(places[0])))
    folder = SocketFolder()
    assert folder.path.parent == places[1]
    assert len(os.fsencode(folder.path / SOCKET)) <= 107
    folder.close()


def test_where_no_folder_is_short_the_message_says_what_to_set(places, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(long(places[0])))
    monkeypatch.setattr(process, "OTHERS", ())
    with pytest.raises(UserError, match=r"^TMPDIR: .* at most 79 bytes; .*x is none\. Set TMPDIR"):
        SocketFolder()


def test_what_a_killed_run_left_is_removed_by_the_next_start_once_its_server_has_ended(places):
    foreign = places[0] / "genssl-mine"
    foreign.mkdir()
    (foreign / "precious").touch()
    link = places[0] / "genssl-link"
    link.symlink_to(foreign)
    environment = {**os.environ, "TMPDIR": str(places[0])}
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, env=environment) as run:
        child, path = run.stdout.readline().split()
        SocketFolder().close()
        assert (Path(path) / MARKER).exists(), "the run lives"
        run.kill()
    try:
        SocketFolder().close()
        assert (Path(path) / MARKER).exists(), "its server lives"
    finally:
        os.kill(int(child), signal.SIGKILL)
    ends = time.monotonic() + 60
    while Path(path).exists():
        assert time.monotonic() < ends
        SocketFolder().close()
    assert {entry.name for entry in places[0].iterdir()} == {"genssl-mine", "genssl-link"}, "nothing without our mark"
    assert (foreign / "precious").exists()
