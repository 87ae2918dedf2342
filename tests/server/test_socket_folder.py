"""Folders for the sockets of embedded servers: short whatever TMPDIR is, and removed once nobody uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from genssl.errors import UserError
from genssl.server import socket_folder
from genssl.server.socket_folder import MARKER, SOCKET, SocketFolder

HOLD = """
import subprocess, sys, time
from genssl.server.socket_folder import SocketFolder
folder = SocketFolder()
command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
child = subprocess.Popen(command, pass_fds=[folder.descriptor], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Stands for the machine's folders for temporary files, the first being TMPDIR."""
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places[0]))
    monkeypatch.setattr(socket_folder, "OTHERS", (str(places[1]),))
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
    monkeypatch.setattr(socket_folder, "OTHERS", ())
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
