"""A real server process on a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """`genssl serve-generator` in a process of its own."""

    def __init__(self, folder: Path, *overrides: str, address: str = "127.0.0.1:0") -> None:
        self.log_path = folder / "server.log"
        address_file = folder / "address"
        address_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "genssl", "serve-generator", str(ROOT / "servers" / "digits_unclip.yaml")]
        command += [f"address={address}", "threads=1", *overrides, "--address-file", str(address_file)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT)
        while not address_file.exists():
            assert self.process.poll() is None, self.log_path.read_text()
            time.sleep(0.02)
        self.address = address_file.read_text().strip()

    def health(self) -> int:
        with grpc.insecure_channel(self.address) as channel:
            return (
                health_pb2_grpc.HealthStub(channel)
                .Check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
                .status
            )

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + 90
        while self.health() != health_pb2.HealthCheckResponse.SERVING:
            assert self.process.poll() is None, self.log_path.read_text()
            assert time.monotonic() < deadline, self.log_path.read_text()
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        return self.process.wait(timeout=30)


@contextmanager
def running_server(folder: Path, *overrides: str, address: str = "127.0.0.1:0") -> Iterator[ServerProcess]:
    server = ServerProcess(folder, *overrides, address=address)
    try:
        yield server
    finally:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def start_server():
    """The context manager that starts a server process."""
    return running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    with running_server(
        tmp_path_factory.mktemp("server"), "limits.max_variants_per_request=64", "limits.max_image_pixels=10000"
    ) as running:
        running.wait_until_serving()
        yield running
