"""What a server adds to the generator: `pytest tests/benchmarks/test_serving.py --benchmark-only`.

The aim is 0.90 of direct in-process generation at its best batch size, on equal threads, with batches at least 0.8
full, for one client and for four. Server and generator take turns within each measurement; `genssl bench-server` does
the same for any server. Wants a machine with two free cores: one for the server's networks, one for everything else.
"""

from __future__ import annotations

import asyncio
import statistics

import pytest
from server_fixtures import running_server

from genssl.bench.server import Load, bench


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with running_server(folder, "buckets=[1, 4, 16, 64, 256]", address=f"unix:{folder}/socket") as running:
        running.wait_until_serving()
        yield running


@pytest.mark.parametrize("clients", [1, 4])
def test_throughput(benchmark, server, clients):
    load = Load(clients=clients, rows=64, in_flight=12 // clients, seconds=6, rounds=3)
    reports = []

    def measure() -> None:
        reports.append(asyncio.run(bench(server.address, load)))

    benchmark.pedantic(measure, rounds=3)
    ratio = statistics.median(report["ratio_to_in_process"] for report in reports)
    occupancy = statistics.median(report["occupancy"] for report in reports)
    benchmark.extra_info.update(ratio_to_in_process=ratio, occupancy=occupancy, report=reports[-1])
    print(f"{clients} clients: {ratio:.3f} of in-process, occupancy {occupancy:.2f}")
    assert ratio >= 0.9
    assert occupancy >= 0.8
