"""`genssl top` against a small server process with real statistics."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
import trustme
from rich.console import Console
from server_without_generator import server_without_generator

from genssl import __version__
from genssl.cli.server.top import top as top_command
from genssl.cli.server.top_tables import History, lines, screen
from genssl.errors import UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc

TOKEN = "0123456789abcdef-token"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "genssl", "top", *arguments]


def top(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def server():
    with server_without_generator() as running:
        with grpc.insecure_channel(running.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            for name in ("trainer-0", "trainer-0", "evil [red]\x1b[2J"):
                request = pb.GenerateVariantsRequest(client_id=name, variants=[pb.VariantSpec()] * 8)
                stub.GenerateVariants(request, timeout=5)
            with pytest.raises(grpc.RpcError):
                stub.GenerateVariants(pb.GenerateVariantsRequest(generator_id="full"), timeout=5)
        yield running


def test_once_prints_one_table(server):
    done = top("--target", server.address, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"genssl {__version__} at {server.address} | cpu | serving | up ")
    assert "event loop lag" in first
    assert "4 requests" in first
    assert [cell.strip() for cell in rows["digits"].split("│")[2:6]] == ["0", "7", "0", "3"]
    for cell in ("75%", "0.200s", "0.500s", "16", "generated 75%, memory 25%"):
        assert f" {cell} " in rows["digits"]
    assert [cell.strip() for cell in rows["trainer-0"].split("│")[2:4]] == ["9", "16"]
    assert "evil [red]?[2J" in rows, "neither the terminal nor rich obeys a client's name"
    assert "\x1b" not in done.stdout
    assert "refused: queue_full 1" in done.stdout


def test_nothing_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    for target in (address, f"unix:{tmp_path}/none.sock"):
        done = top("--target", target, "--once")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"genssl: --target {target}: no answer (")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_something_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        done = top("--target", f"127.0.0.1:{silent.getsockname()[1]}", "--once")
    assert done.returncode == 2
    assert "no answer" in done.stderr
    assert time.monotonic() - started < 8, "5 s, and the start of Python"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "nowhere"}, "--target nowhere: an address is host:port"),
        ({"ca": Path("none.pem")}, "--ca none.pem: No such file or directory"),
        ({"token_file": Path("none")}, "--token-file: none cannot be read (No such file or directory)"),
        ({"token_file": Path(os.devnull)}, f"--token-file: {os.devnull} holds no token"),
        ({"key": Path("k.pem")}, "--certificate and --key belong together, and need --ca"),
        ({"key": Path("k.pem"), "certificate": Path("c.pem")}, "--certificate and --key belong together, and need"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        top_command(**{"target": "127.0.0.1:1", "once": True, **options})


def test_tls_and_a_token(tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "wrong").write_text("x" * 20)
    tls = {"certificate": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.pem")}
    ca = ("--ca", str(tmp_path / "ca.pem"))
    with server_without_generator(tls=tls, tokens=[{"name": "me", "file": str(tmp_path / "token")}]) as server:
        known = top("--target", server.address, *ca, "--token-file", str(tmp_path / "token"), "--once")
        nobody = top("--target", server.address, *ca, "--once")
        wrong = top("--target", server.address, *ca, "--token-file", str(tmp_path / "wrong"), "--once")
    assert (known.returncode, known.stderr) == (0, "")
    assert "│ digits" in known.stdout
    assert nobody.returncode == wrong.returncode == 2
    assert "this server asks for a token" in nobody.stderr
    assert nobody.stderr.rstrip().endswith("give it with --token-file")
    assert "the token is not known here" in wrong.stderr


def test_a_server_that_goes_away_may_come_back():
    with server_without_generator() as first:
        address = first.address
        process = subprocess.Popen(
            command("--target", address, "--interval", "0.2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert " digits queued=7 running=3 " in process.stdout.readline()
            first.stop()
            wait_for(process, "no answer for ")
            with server_without_generator(address=address):
                wait_for(process, " digits queued=7 ")
                process.send_signal(signal.SIGINT)
                _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 130
    assert stderr == "\ngenssl: interrupted\n"


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed; {process.stderr.read()}")


def test_on_a_terminal_the_table_is_redrawn_and_ctrl_c_gives_the_terminal_back(server):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen(
        command("--target", server.address, "--interval", "0.2"), stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    try:
        deadline = time.monotonic() + 20
        while seen.count(b"refused: queue_full 1") < 3:
            assert time.monotonic() < deadline, seen
            assert select.select([ours], [], [], 20)[0]
            seen += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        while select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # nobody has the other end any more
                break
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"\x1b[?1049h" in seen
    assert b"\x1b[?25h" in seen.partition(b"\x1b[?1049l")[0] + seen.partition(b"\x1b[?1049l")[2]
    assert b"Traceback" not in seen
    assert seen.rstrip().endswith(b"genssl: interrupted")


# ---- Rates ----


def answer(uptime: float, variants: int, batches: int = 0) -> pb.GetStatisticsResponse:
    sizes = [pb.BatchStatistics(bucket=8, batches=batches, rows=6 * batches, generate_seconds=0.5 * batches)]
    generator = pb.GeneratorStatistics(
        generator_id="digits", variants_generated=variants, batches=sizes, queue_wait_seconds=12 * batches
    )
    return pb.GetStatisticsResponse(uptime_seconds=uptime, state="serving", generators=[generator])


def test_rates_are_of_the_last_ten_seconds():
    now = [0.0]
    history = History("here", clock=lambda: now[0])
    history.add(answer(1000, 5000, 100))
    load = history.load(history.latest.generators[0])
    assert (load.variants_per_second, load.occupancy, load.wait, load.batch) == (5, 0.75, 2, 0.5)
    for second in range(1, 31):
        now[0] = second
        history.add(answer(1000 + second, 5000 + 7 * second, 100))
    load = history.load(history.latest.generators[0])
    assert load.variants_per_second == pytest.approx(7)
    assert (load.occupancy, load.wait, load.batch) == (None, None, None)
    assert " variants/s=7.0 occupancy=- wait=- batch=-" in lines(history)[0]


def test_a_restarted_server_has_no_negative_rates():
    history = History("here", clock=lambda: 0.0)
    history.add(answer(1000, 5000))
    history.add(answer(2, 10))
    assert history.load(history.latest.generators[0]).variants_per_second == 5


def test_trouble_is_shown_above_the_last_table():
    now = [0.0]
    history = History("here", clock=lambda: now[0])
    history.add(answer(10, 10))
    history.trouble, now[0] = "connection refused", 7.0
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(screen(history))
    text = console.export_text()
    assert "no answer for 7 s (connection refused); trying again" in text
    assert "digits" in text
    history.add(answer(18, 10))
    assert history.trouble == ""
