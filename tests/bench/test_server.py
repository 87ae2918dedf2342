"""`genssl bench-server` against a real server: what it measures is there and adds up."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from genssl.bench.server import Load, bench


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genssl", "bench-server", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_the_json_file_has_the_ratio_to_in_process_generation(server, tmp_path):
    out = tmp_path / "bench.json"
    arguments = ["--seconds", "1.5", "--rounds", "3", "--rows", "16", "--clients", "2", "--json", str(out)]
    done = command("--target", server.address, *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["variants"] == 16 * report["requests"] > 0
    assert 0 < report["latency_seconds"]["p50"] <= report["latency_seconds"]["p99"] <= report["latency_seconds"]["max"]
    assert 0 < report["occupancy"] <= 1
    assert report["batches"] > 0
    assert report["server"]["threads"] == 1
    assert report["in_process"]["batch_size"] in report["server"]["buckets"]
    assert len(report["rounds"]) == 3
    ratios = sorted(turn["server"] / turn["in_process"] for turn in report["rounds"])
    assert report["ratio_to_in_process"] == pytest.approx(ratios[1], rel=0.01)
    assert "ratio to in process" in done.stdout


def test_open_loop_latency_counts_from_when_a_request_was_due(server):
    load = Load(rows=8, rate=160.0, seconds=1.0, rounds=1)
    report = asyncio.run(bench(server.address, load, in_process=False))
    assert report["requests"] == 20
    assert report["ratio_to_in_process"] is None
    assert report["why_no_ratio"] == "not asked for"


def test_every_variant_is_a_new_one(server):
    load = Load(rows=16, seconds=0.5, rounds=1)
    first = asyncio.run(bench(server.address, load, in_process=False))
    again = asyncio.run(bench(server.address, load, in_process=False))
    assert first["occupancy"] > 0
    assert again["batches"] > 0, "nothing came from the server's memory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "nowhere"], "--target nowhere: an address is host:port"),
        (["--target", "127.0.0.1:1", "--json", "no/where/x.json"], "the folder no/where does not exist"),
        (["--target", "127.0.0.1:1", "--token-file", "none"], "--token-file: none cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
