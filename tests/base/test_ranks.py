"""Runs under torchrun: two gloo ranks train as one process does, and an error of one ends both."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genssl.base.ranks import ALONE, Ranks
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import ConfigError, UserError
from genssl.training.run import require_divisible

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "simclr_sd.yaml"
QUICK = [
    "train.epochs=2",
    "train.batch_size=478",  # three steps an epoch
    "schedule.warmup_epochs=0",
    "backbone.width=4",
    "train.threads=1",
    "evaluate=[knn]",
    "optimizer={name: sgd, lr: 0.0001}",  # so small that rounding does not grow into another training
]

# What torchrun starts: the command line, with a look at every rank's weights, or a mishap on rank 1.
RANK = """
import hashlib, os, signal, sys
from pathlib import Path
folder, mishap, *arguments = sys.argv[1:]
from genssl.errors import UserError
from genssl.training import run as module

rank = os.environ["RANK"]
update = module.Update.__call__
methods = []


def watched(self, *arguments):
    methods.append(self._method)
    if rank == "1" and len(methods) == 3:
        if mishap == "error":
            raise UserError("a mishap of rank 1")
        if mishap == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *arguments)


module.Update.__call__ = watched
sys.argv = ["genssl", *arguments]
from genssl.cli.main import main
try:
    main()
finally:
    if methods:
        digest = hashlib.blake2b(digest_size=8)
        for name, value in methods[-1].state_dict().items():
            digest.update(value.numpy().tobytes())
        (Path(folder) / f"rank-{rank}").write_text(digest.hexdigest())
"""


def torchrun(folder: Path, mishap: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [str(script), str(folder), mishap, "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)


# One update of a whole method in float64, by one process or by two ranks, on different rows; saves the weights.
UPDATE = """
import os, sys
import torch
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.methods.base import Views
from genssl.registry import BACKBONES, METHODS
from genssl.base.devices import seeded_initialisation
from genssl.base.batch_norm import synchronise_batch_norm
from genssl.base.ranks import ALONE, joined
from genssl.training.update import Update

recipe_file, out, accumulate, name = sys.argv[1:]
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
recipe = load(Recipe, recipe_file, ["backbone.width=4", f"method={{name: {name}}}", f"train.accumulate={accumulate}"])
cpu = torch.device("cpu")
with joined() as ranks:
    with seeded_initialisation("model"):
        method = METHODS.get(name)(recipe.method, BACKBONES.get("resnet18")(recipe.backbone))
    if ranks.size > 1:
        method = synchronise_batch_norm(method, cpu)
    method.double().train()
    update = Update(method, torch.optim.SGD(method.parameters(), lr=1.0), recipe.train, cpu, ranks)
    draws = torch.Generator().manual_seed(3)
    images = torch.rand(2, 16, 3, 8, 8, generator=draws)
    rows = slice(ranks.rank * 16 // ranks.size, (ranks.rank + 1) * 16 // ranks.size)
    loss, _ = update(Views(pair=(images[0, rows], images[1, rows])), 0.05, 0, 0)
    method.after_step(0.1)
    loss, _ = ranks.agree(loss, False, cpu)
    torch.save({"loss": loss, "state": method.state_dict()}, f"{out}-{ranks.rank}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "barlow_twins", "moco"])
def test_an_update_of_two_ranks_is_that_of_one_process(tmp_path, name):
    """In float64, since early gradients of a deep net with batch norm differ by 1 % in float32 for another order."""
    script = tmp_path / "update.py"
    script.write_text(UPDATE)
    one = [sys.executable, str(script), str(RECIPE), str(tmp_path / "one"), "1", name]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    two = [sys.executable, *launch, str(script), str(RECIPE), str(tmp_path / "two"), "1", name]
    for command in (one, two):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    alone, first, second = (
        torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in ("one-0", "two-0", "two-1")
    )
    assert alone["loss"] == pytest.approx(first["loss"], rel=1e-9)
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        assert torch.allclose(value, first["state"][key], rtol=1e-7, atol=1e-9), key


@pytest.mark.slow
def test_two_ranks_train_as_one_process(tmp_path):
    """Batch norm, loss, order, variants and augmentations are those of the global batch; one server serves both."""
    overrides = [str(RECIPE), *QUICK, "variants.batching=deterministic", "views.probability=0.3"]
    overrides += ["monitor.knn_every_epochs=1", "monitor.bank=301"]  # each rank has a part of the bank, not of one size
    done = torchrun(tmp_path, "none", *overrides, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1, "the first rank alone speaks"
    subprocess.run(
        [sys.executable, "-m", "genssl", "run", *overrides, "--out", str(tmp_path / "one")],
        check=True,
        capture_output=True,
        timeout=200,
        cwd=ROOT,
    )
    logs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    losses, knn = ([[row[name] for row in log] for log in logs] for name in ("loss", "knn_top1"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert knn[0] == pytest.approx(knn[1], abs=0.01)
    assert (tmp_path / "rank-0").read_text() == (tmp_path / "rank-1").read_text()
    names = [{path.name for path in (tmp_path / run).iterdir()} for run in ("one", "two")]
    assert names[0] == names[1]
    alone, results = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert results["metrics"]["knn/top1"] == pytest.approx(alone["metrics"]["knn/top1"], abs=0.01)
    assert results["protocol"] == alone["protocol"], "of the whole bank, of which each rank had a part"
    assert results["provenance"]["ranks"] == {"count": 2, "ledger": "of rank 0, whose part of every batch is 1/2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mishap", "message"),
    [("error", "genssl: a mishap of rank 1"), ("kill", "genssl: rank 0 has lost another rank of this run")],
)
def test_an_error_on_one_rank_ends_all_with_one_message_and_no_hang(tmp_path, mishap, message):
    started = time.monotonic()
    overrides = [str(RECIPE), *QUICK, "variants.source=none", "train.checkpoint_every_steps=1"]
    done = torchrun(tmp_path, mishap, *overrides, "--out", str(tmp_path / "out"))
    assert time.monotonic() - started < 200
    assert done.returncode != 0
    assert next(line for line in done.stderr.splitlines() if line.startswith("genssl: ")).startswith(message)
    assert done.stderr.count("\ngenssl: ") + done.stderr.startswith("genssl: ") == 1
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    if mishap == "kill":
        again = torchrun(tmp_path, "none", "--resume", str(tmp_path / "out"))
        assert again.returncode == 0, again.stderr
        assert "resumed after step 2 of 6" in again.stdout


def test_a_batch_that_does_not_divide_is_one_sentence():
    recipe = load(Recipe, RECIPE, ["train.batch_size=128"])
    require_divisible(recipe, ALONE)
    require_divisible(recipe, Ranks(rank=0, size=4))
    with pytest.raises(
        ConfigError, match=r"train.batch_size: 128 is the global batch and does not divide among 3 ranks"
    ):
        require_divisible(recipe, Ranks(rank=0, size=3))
    halves = load(Recipe, RECIPE, ["train.batch_size=128", "train.accumulate=4"])
    with pytest.raises(ConfigError, match=r"among 64 ranks with 4 micro-batches each \(train.accumulate\) into equal"):
        require_divisible(halves, Ranks(rank=0, size=64))


def test_more_ranks_than_devices_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(rank=1, size=2, local=1, local_size=2).device(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(
        UserError, match=r"3 ranks were started on a machine with 2 CUDA devices; lower --nproc-per-node"
    ):
        Ranks(rank=1, size=3, local=1, local_size=3).device(torch.device("cuda"))
    with pytest.raises(UserError, match=r"cuda:0 names one device for 2 ranks; set it to cuda or auto"):
        Ranks(rank=1, size=2, local=1, local_size=2).device(torch.device("cuda:0"))
