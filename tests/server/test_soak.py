"""Ten minutes of eight clients under `reuse` at a server with a store: what it holds does not grow with time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

CLIENT = Path(__file__).parents[1] / "helpers" / "soak_client.py"
CLIENTS = 8
MINUTE = 60.0
WARM_UP, WATCHED = 5 * MINUTE, 5 * MINUTE
PERIOD = 2.0
GROWTH_BYTES = 5 * 2**20


class Sample:
    """What a process holds: resident bytes but those of the store's map, open files, threads of its own and of gRPC.

    gRPC names its threads. Its pool starts one more when its queue stands still, and ends it when there is no work.
    """

    def __init__(self, pid: int, mapped_file: str) -> None:
        process = Path(f"/proc/{pid}")
        resident = mapped = 0
        counted = False
        for line in (process / "smaps").read_text().splitlines():
            if "-" in line.split(maxsplit=1)[0]:  # the first line of a mapping
                counted = line.endswith(mapped_file)
            elif line.startswith("Rss:"):
                resident += int(line.split()[1]) * 1024
                mapped += int(line.split()[1]) * 1024 * counted
        self.held, self.mapped = resident - mapped, mapped
        self.files = len(list((process / "fd").iterdir()))
        names = []
        for thread in (process / "task").iterdir():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                names.append((thread / "comm").read_text())
        self.own_threads = names.count((process / "comm").read_text())
        self.grpc_threads = len(names) - self.own_threads


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_under_eight_clients_holds_no_more_after_ten_minutes_than_after_five(start_server, tmp_path):
    settings = [
        f"store={{path: {tmp_path / 'store'}, max_bytes: 1073741824}}",
        "memory_cache_bytes=65536",
        "embedding_cache=256",
    ]
    with start_server(tmp_path, *settings) as server:
        server.wait_until_serving()
        clients = [
            subprocess.Popen(
                [sys.executable, str(CLIENT), server.address, str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(CLIENTS)
        ]
        try:
            time.sleep(WARM_UP)
            samples = []
            started = time.monotonic()
            while time.monotonic() < started + WATCHED:
                samples.append(Sample(server.process.pid, "data.mdb"))
                time.sleep(PERIOD)
            assert all(client.poll() is None for client in clients)
            outputs = [json.loads(client.communicate()[0]) for client in clients]
        finally:
            for client in clients:
                client.kill()
                client.wait()
    tenth = len(samples) // 10
    early, late = (median(sample.held for sample in part) for part in (samples[:tenth], samples[-tenth:]))
    print(
        f"held {early / 2**20:.1f}, then {late / 2**20:.1f} MiB; the store's map {samples[-1].mapped / 2**20:.1f} MiB"
    )
    assert late - early < GROWTH_BYTES
    assert len({sample.files for sample in samples}) == 1, sorted({sample.files for sample in samples})
    own = [sample.own_threads for sample in samples]
    assert max(own) <= min(own) + 1, own  # the loop's pool may start its second thread late
    pool = [sample.grpc_threads for sample in samples]
    assert max(pool) <= min(pool) + 4, pool
    assert samples[0].mapped > 0, "the store's map was found"
    assert all(output["steps"] > (WARM_UP + WATCHED) / 4 for output in outputs), outputs
    origins = [output["origins"] for output in outputs]
    assert all(came.get("generated", 0) and came.get("store", 0) for came in origins), origins
