"""Runs from recipe to run directory: three sources of the same variants, and every way a run can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from short_runs import RECIPE, ROOT, SHORT, run_and_read

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.base.devices import pick_device
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import ConfigError, RequestRefusedError, ServerUnavailableError, UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.training.supply.open import _check_same_model

QUICK = [*SHORT, "evaluate=[knn]"]


def quietly(recipe: Recipe, out: Path) -> dict:
    results, _ = run_and_read(recipe, out)
    return results


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """A finished online run of one epoch, and its directory."""
    out = tmp_path_factory.mktemp("runs") / "online"
    recipe = load(Recipe, RECIPE, QUICK)
    return quietly(recipe, out), out


def test_the_run_directory_is_complete(online):
    results, out = online
    expected = {
        "recipe.yaml",
        "metrics.jsonl",
        "metrics.csv",
        "results.json",
        "encoder.safetensors",
        "checkpoint.pt",
        "samples.png",
        "report.html",
        "server.log",
    }
    assert {path.name for path in out.iterdir()} == expected
    assert json.loads((out / "results.json").read_text()) == results
    assert load(Recipe, out / "recipe.yaml") == load(Recipe, RECIPE, QUICK)


def test_the_ledger_says_that_the_server_made_every_variant(online):
    results, out = online
    ledger = results["ledger"]
    steps = 1437 // 128
    assert ledger["variants_generated"] == ledger["distinct_variants"] == steps * 128
    assert ledger["fresh_fraction"] == 1.0
    assert ledger["bytes_received"] == steps * 128 * 3 * 8 * 8
    assert ledger["generator_seconds"] > 0
    assert (ledger["variants_reused"], ledger["fallbacks_to_real"], ledger["variants_from_store"]) == (0, 0, 0)
    log = (out / "server.log").read_text()
    assert "serving stable_unclip" in log
    assert log.rstrip().endswith("stopped")
    assert results["provenance"]["variants"]["server"]["pid"] != os.getpid()


def test_the_encoder_file_rebuilds_the_backbone(online):
    _, out = online
    with safe_open(out / "encoder.safetensors", "pt") as file:
        config = ResNet18Config.model_validate_json(file.metadata()["backbone"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    build_resnet(config).load_state_dict(weights)
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert all(torch.equal(value, checkpoint["method"][f"backbone.{name}"]) for name, value in weights.items())


def test_the_picture_shows_sources_and_variants(online):
    _, out = online
    picture = np.asarray(Image.open(out / "samples.png").convert("L"))
    assert picture.shape[1] > 800
    assert picture.std() > 30


def test_the_epoch_log_has_loss_and_ledger(online):
    _, out = online
    (row,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert row["epoch"] == 1
    assert 0 < row["loss"] < 10
    assert row["variants_generated"] == 1408


def test_in_process_training_sees_the_same_variants(online, tmp_path, quick_recipe):
    """Equal variants (to 1 grey level) and an equal plan: losses agree to what one grey level can do."""
    _, out = online
    quietly(quick_recipe("variants.source=in_process"), tmp_path / "in_process")
    a, b = (json.loads((one / "metrics.jsonl").read_text().splitlines()[-1]) for one in (out, tmp_path / "in_process"))
    assert a["loss"] == pytest.approx(b["loss"], abs=0.02)
    assert a["distinct_variants"] == b["distinct_variants"]


def test_equal_runs_are_equal_bit_for_bit(tmp_path, quick_recipe):
    recipe = quick_recipe("variants.source=in_process", "views.probability=0.5")
    for name in ("a", "b"):
        quietly(recipe, tmp_path / name)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["method"] for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_baseline_starts_no_server(tmp_path, quick_recipe):
    results = quietly(quick_recipe("variants.source=none"), tmp_path / "none")
    assert not (tmp_path / "none" / "server.log").exists()
    assert results["ledger"]["variants_generated"] == 0
    assert results["provenance"]["variants"] == {"source": "none"}
    page = (tmp_path / "none" / "report.html").read_text()
    assert "No variants: the baseline." in page


def test_held_out_train_images_replace_the_test_split(tmp_path, quick_recipe):
    results = quietly(quick_recipe("variants.source=none", "train.validation_fraction=0.25"), tmp_path / "held")
    assert results["protocol"]["knn"]["tested_on"] == "validation (0.25 of train)"
    assert results["protocol"]["knn"]["bank"] + results["protocol"]["knn"]["tested"] == 1437
    assert results["provenance"]["dataset"]["images"] == results["protocol"]["knn"]["bank"]


def test_a_used_directory_is_refused_and_left_alone(online):
    _, out = online
    before = (out / "results.json").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        quietly(load(Recipe, RECIPE, QUICK), out)
    assert (out / "results.json").read_bytes() == before


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path, quick_recipe):
    with pytest.raises(ConfigError, match=r"train.batch_size: 2000 is more than the 1437 training images"):
        quietly(quick_recipe("train.batch_size=2000"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tmp_path, quick_recipe):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at epoch \d+, step \d+; lower optimizer.lr"):
        quietly(quick_recipe("variants.source=none", "optimizer={name: sgd, lr: 1.0e+30}"), tmp_path / "nan")
    assert not (tmp_path / "nan" / "results.json").exists()


@pytest.mark.slow
def test_a_missing_model_is_told_before_training(tmp_path, quick_recipe):
    with pytest.raises(UserError, match="there is no built-in model 'nothing'"):
        quietly(quick_recipe("generator.model=builtin:nothing"), tmp_path / "out")


def test_a_server_that_is_not_the_recipes_is_refused(tmp_path, quick_recipe):
    info = pb.GeneratorInfo(
        generator_id="stable_unclip",
        name="stable_unclip",
        model="builtin:digits-unclip",
        settings={"dtype": "bfloat16", "revision": "None", "output_size": "None"},
    )
    recipe = quick_recipe("variants.server=127.0.0.1:1")
    with pytest.raises(RequestRefusedError, match=r"dtype bfloat16 \(the recipe: float32\)"):
        _check_same_model(recipe, info)
    info.settings["dtype"] = "float32"
    _check_same_model(recipe, info)


def test_a_device_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match=r"device cuda:99: this machine has \d+ usable CUDA devices"):
        pick_device("cuda:99")


def test_evaluators_are_checked_before_the_training(tmp_path, quick_recipe):
    with pytest.raises(UserError, match=r"few_shot.labels_per_class"):
        quietly(quick_recipe("evaluate=[{name: few_shot, labels_per_class: 500}]"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Processes: what happens to a run when something is killed ----


class RunningRun:
    """`genssl run` in a process of its own, past its first epoch."""

    def __init__(self, out: Path, *overrides: str) -> None:
        self.out = out
        command = [
            sys.executable,
            "-m",
            "genssl",
            "run",
            str(RECIPE),
            *QUICK,
            "train.epochs=500",
            *overrides,
            "--out",
            str(out),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        deadline = time.monotonic() + 120
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def __enter__(self) -> RunningRun:
        return self

    def __exit__(self, *details: object) -> None:
        self.process.kill()
        self.process.communicate()

    def server_pid(self) -> int:
        """Finds the server among the children of the run."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(child) for child in children if "serve-generator" in Path(f"/proc/{child}/cmdline").read_text()]
        return pid


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("late", ["block", pytest.param("reuse", marks=pytest.mark.slow)])
def test_a_server_killed_mid_run_ends_the_run_with_its_address_and_what_to_do(tmp_path, late):
    with RunningRun(tmp_path / "out", f"variants.late={late}") as running:
        os.kill(running.server_pid(), signal.SIGKILL)
        _, errors = running.process.communicate(timeout=60)
    assert running.process.returncode == 2
    assert "Traceback" not in errors
    for words in (
        "genssl: the generation server of this run",
        "unix:/",
        "killed by signal 9",
        "Start the run again",
        "server.log",
    ):
        assert words in errors.replace("\n", " ")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_no_process_outlives_an_interrupted_run(tmp_path, number):
    with RunningRun(tmp_path / "out") as running:
        server = running.server_pid()
        running.process.send_signal(number)
        _, errors = running.process.communicate(timeout=60)
    wait_until_gone(server)
    if number != signal.SIGKILL:
        assert running.process.returncode == 128 + number
        assert "Traceback" not in errors
        assert "interrupted" in errors


@pytest.mark.slow
def test_a_run_survives_the_restart_of_a_server_of_its_own(tmp_path):
    """The README's second terminal: the server is killed and started again while the run goes on."""
    socket = f"unix:{tmp_path}/server.sock"

    def start() -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "genssl",
            "serve-generator",
            "servers/digits_unclip.yaml",
            f"address={socket}",
            "threads=1",
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not Path(socket.removeprefix("unix:")).is_socket():  # imports alone take 15 s on a busy machine
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    server = start()
    try:
        with RunningRun(tmp_path / "out", f"variants.server={socket}") as running:
            server.kill()
            server.wait()
            Path(socket.removeprefix("unix:")).unlink()
            log = tmp_path / "out" / "metrics.jsonl"
            done = len(log.read_text().splitlines())
            server = start()
            deadline = time.monotonic() + 90
            while len(log.read_text().splitlines()) < done + 3:
                assert running.process.poll() is None, running.process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        last = json.loads(log.read_text().splitlines()[-1])
        assert last["retries"] > 0
        assert last["fresh_fraction"] == 1.0, "no variant was replaced silently"
    finally:
        server.kill()
        server.wait()


def test_an_unreachable_server_is_an_error_before_training(tmp_path, quick_recipe, monkeypatch):
    monkeypatch.setattr("genssl.client.balancer.CONNECT_SECONDS", 1.0)
    with pytest.raises(ServerUnavailableError, match=r"nobody.sock gives no answer"):
        quietly(quick_recipe(f"variants.server=unix:{tmp_path}/nobody.sock"), tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
