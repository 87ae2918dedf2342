"""Whole runs on two machines under torchrun: two network namespaces, each with its own address and working folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "simclr_sd.yaml"
QUICK = [
    "train.epochs=1",
    "train.batch_size=476",  # three steps
    "schedule.warmup_epochs=0",
    "backbone.width=4",
    "train.threads=1",
    "evaluate=[]",
    "views.probability=0.1",
]
ADDRESSES = ("10.213.77.1", "10.213.77.2")

# What torchrun starts: the command line, then the weights of the rank's training as it ended.
RANK = """
import hashlib, os, sys
from pathlib import Path
from genssl.training import run as module

update, methods = module.Update.__call__, []


def watched(self, *arguments):
    methods.append(self._method)
    return update(self, *arguments)


module.Update.__call__ = watched
sys.argv = ["genssl", *sys.argv[1:]]
from genssl.cli.main import main
try:
    main()
finally:
    if methods:
        digest = hashlib.blake2b(digest_size=8)
        for name, value in methods[-1].state_dict().items():
            digest.update(value.numpy().tobytes())
        Path(f"rank-{os.environ['RANK']}").write_text(digest.hexdigest())
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[tuple[str, str, Path]]]:
    """Two hosts: the namespace of each, the name of its network device, and its working folder."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    tag = uuid.uuid4().hex[:6]
    made = [(f"genssl-{tag}-{end}", f"gs{tag}{end}", tmp_path / f"host-{end}") for end in (0, 1)]
    try:
        try:
            for space, _, folder in made:
                _ip("netns", "add", space)
                folder.mkdir()
            _ip("link", "add", made[0][1], "type", "veth", "peer", "name", made[1][1])
            for (space, device, _), address in zip(made, ADDRESSES, strict=True):
                _ip("link", "set", device, "netns", space)
                _ip("-n", space, "address", "add", f"{address}/24", "dev", device)
                _ip("-n", space, "link", "set", device, "up")
                _ip("-n", space, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        for space, device, _ in made:
            subprocess.run(["ip", "link", "del", device], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


@pytest.fixture
def run_on_both(hosts, tmp_path) -> Callable[..., list[tuple[int, str, str]]]:
    """Returns what starts `genssl run` under torchrun on both hosts, and gives exit code, output and errors of each."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def start(*arguments: str, ranks_each: int = 1) -> list[tuple[int, str, str]]:
        started = []
        try:
            for number, (space, device, folder) in enumerate(hosts):
                command = ["ip", "netns", "exec", space, sys.executable, "-m", "torch.distributed.run"]
                command += ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", str(ranks_each)]
                command += ["--master-addr", ADDRESSES[0], "--master-port", "29507", str(script), "run", *arguments]
                environment = {**os.environ, "GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}
                environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
                started.append(
                    subprocess.Popen(
                        command,
                        cwd=folder,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            said = [process.communicate(timeout=300) for process in started]
        finally:
            for process in started:
                process.terminate()  # torchrun ends its ranks
                process.wait(timeout=60)
        return [(process.returncode, *both) for process, both in zip(started, said, strict=True)]

    return start


def told(result: tuple[int, str, str]) -> list[str]:
    return [line for line in result[2].splitlines() if line.startswith("genssl: ")]


@pytest.mark.slow
def test_a_run_on_two_machines_without_a_shared_folder_ends_well_and_with_equal_weights(hosts, run_on_both):
    results = run_on_both(str(RECIPE), *QUICK, "--out", "runs/two", ranks_each=2)
    assert [code for code, _, _ in results] == [0, 0], "\n".join(errors for _, _, errors in results)
    folders = [folder for _, _, folder in hosts]
    weights = [(folders[rank // 2] / f"rank-{rank}").read_text() for rank in range(4)]
    assert len(set(weights)) == 1
    assert "serving" in (folders[0] / "runs" / "two" / "server.log").read_text()
    assert "serving" in (folders[1] / "runs" / "two" / "server-1.log").read_text(), "a server of each machine's own"
    found = json.loads((folders[0] / "runs" / "two" / "results.json").read_text())
    assert found["ledger"]["variants_generated"] > 0
    assert found["provenance"]["ranks"]["count"] == 4


@pytest.mark.slow
def test_a_resumed_run_whose_second_machine_lacks_the_checkpoint_is_refused(hosts, run_on_both):
    quick = [str(RECIPE), *QUICK, "variants.source=none", "--resume", "runs/two"]
    alone = [sys.executable, "-m", "genssl", "run", *quick]  # how many processes have begun it makes no difference
    environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))}
    subprocess.run(alone, cwd=hosts[0][2], env=environment, check=True, capture_output=True, timeout=200)
    first = hosts[0][2] / "runs" / "two"
    for name in ("results.json", "report.html"):  # as if it had ended before
        (first / name).unlink()
    checkpoint = (first / "checkpoint.pt").read_bytes()
    results = run_on_both(*quick)
    assert all(code != 0 for code, _, _ in results)
    messages = told(results[0]) + told(results[1])
    assert len(messages) == 1, "one rank speaks for all"
    assert "a rank on" in messages[0]
    assert "found no checkpoint; put the run directory where every machine sees it" in messages[0]
    assert (first / "checkpoint.pt").read_bytes() == checkpoint
