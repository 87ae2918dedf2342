"""Starts the servers of `bare_server.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BARE = Path(__file__).with_name("bare_server.py")
GREY = [np.full((1, 4, 4), level, np.uint8) for level in range(200)]


@contextmanager
def stopped(pid: int):
    """Holds a child process still; the signal alone lets its other threads answer until they are told."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def bare_server(folder: Path, **settings):
    log = folder / f"calls-{time.monotonic_ns()}.json"
    log.write_text("[]")
    command = [sys.executable, str(BARE), json.dumps({**settings, "log": str(log)})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip(), lambda: json.loads(log.read_text())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
