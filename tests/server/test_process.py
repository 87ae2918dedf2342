"""The embedded server ends with its run, however the run ends."""

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
from genssl.server.process import EmbeddedServer
from genssl.server.socket_folder import SocketFolder

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
