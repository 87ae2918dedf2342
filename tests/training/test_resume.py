"""A run that was killed goes on and ends with the weights, bit for bit, of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from short_runs import RECIPE, ROOT, SHORT, run_and_read, without_pictures

from genssl.base.files import claim, is_claimed
from genssl.config.documents.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.registry import METHODS
from genssl.training.run_directory import changed_length, of_length, recipe_of, unfinished_runs

QUICK = [*SHORT, "train.epochs=2", "train.batch_size=256"]
SMALL = [*QUICK, "evaluate=[]", "variants.source=none", "monitor.knn_every_epochs=1", "train.keep_checkpoints=2"]


def quick(*overrides: str) -> Recipe:
    return load(Recipe, RECIPE, [*SMALL, *overrides])


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        yield


def final(out: Path, name: str = "checkpoint.pt") -> dict:
    return torch.load(out / name, weights_only=True)


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, moments, counts, and the log of both are equal to the bit; times are not."""
    first, second = final(one), final(other)
    assert first["method"].keys() == second["method"].keys()
    assert all(torch.equal(first["method"][name], second["method"][name]) for name in first["method"])
    assert_equal(first["optimizer"], second["optimizer"])
    assert_equal(load_file(one / "encoder.safetensors"), load_file(other / "encoder.safetensors"))
    timed = {"seconds", "trainer_seconds", "stall_seconds", "generator_seconds", "fetch_seconds_p50"}
    timed |= {"fetch_seconds_p95", "calls", "bytes_received", "variants_computed", "variants_generated"}
    timed |= {"views_generated", "variants_from_store", "prefetch_depth", "retries"}
    rows = [
        [
            {name: value for name, value in json.loads(line).items() if name not in timed}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in (one, other)
    ]
    assert rows[0] == rows[1]


def assert_equal(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()  # type: ignore[attr-defined]
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):  # type: ignore[call-overload]
            assert_equal(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_and_read(quick(), out)
    return out


# ---- kill -9, at every moment that could matter ----

# Imports once and forks a child for every moment, which runs until there and kills itself.
KILLER = """
import os, signal, sys
from pathlib import Path
import torch
from rich.console import Console
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.training import checkpoint, run as module
from genssl.training.loggers import MetricsLog
from genssl.training.progress import RunProgress
from genssl.training.update import Update

folder, recipe_file, *overrides = sys.argv[1:]
torch.set_num_threads(1)
recipe = load(Recipe, recipe_file, overrides)
module.load_splits(recipe)  # imports what the children would import one after the other
module.BACKBONES.get(recipe.backbone.name), module.METHODS.get(recipe.method.name)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after(owner, name, count):
    whole, calls = getattr(owner, name), []

    def wrapped(*arguments, **keywords):
        result = whole(*arguments, **keywords)
        calls.append(1)
        if len(calls) == count:
            die()
        return result

    setattr(owner, name, wrapped)


def before_rename(count):
    rename, calls = os.replace, []

    def wrapped(source, target):
        if str(target).endswith("checkpoint.pt"):
            calls.append(1)
            if len(calls) == count:
                die()
        return rename(source, target)

    os.replace = wrapped


def half_written(count):
    save, calls = torch.save, []

    def wrapped(state, file):
        save(state, file)
        calls.append(1)
        if len(calls) == count:
            file.truncate(1000)
            file.flush()
            die()

    torch.save = wrapped


MOMENTS = {
    "before_any_checkpoint": lambda: after(Update, "__call__", 2),
    "in_an_epoch": lambda: after(Update, "__call__", 8),
    "between_log_and_checkpoint": lambda: after(MetricsLog, "write", 1),
    "with_a_checkpoint_half_written": lambda: half_written(3),
    "with_the_old_checkpoint_moved_away": lambda: before_rename(2),
    "before_the_report": lambda: after(module, "write_json", 1),
}
for name, prepare in MOMENTS.items():
    child = os.fork()
    if child == 0:
        prepare()
        with (Path(folder) / f"{name}.txt").open("w") as text, RunProgress(Console(file=text)) as progress:
            module.run(recipe, Path(folder) / name, progress)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(name, os.WTERMSIG(status), flush=True)

# The same on the command line, with SIGTERM.
child = os.fork()
if child == 0:
    from genssl.cli.main import main

    def die():
        os.kill(os.getpid(), signal.SIGTERM)

    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"sigterm.{name}", os.O_WRONLY | os.O_CREAT), stream)
    after(Update, "__call__", 7)
    sys.argv = ["genssl", "run", recipe_file, *overrides, "--out", "sigterm"]
    main()
_, status = os.waitpid(child, 0)
print("sigterm", os.WEXITSTATUS(status))
"""
MOMENTS = (
    "before_any_checkpoint",
    "in_an_epoch",
    "between_log_and_checkpoint",
    "with_a_checkpoint_half_written",
    "with_the_old_checkpoint_moved_away",
    "before_the_report",
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder of runs of which each was killed at another moment."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLER, str(folder), str(RECIPE), *SMALL, "train.checkpoint_every_steps=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=ROOT)
    assert done.stdout.splitlines() == [*(f"{moment} 9" for moment in MOMENTS), "sigterm 143"], done.stderr
    for name in ("in_an_epoch", "before_any_checkpoint"):
        shutil.copytree(folder / name, folder / f"{name}-as-killed")
    return folder


@pytest.fixture(scope="module")
def uninterrupted_with_steps(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_and_read(quick("train.checkpoint_every_steps=3"), out)
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(killed, uninterrupted_with_steps, moment):
    out = killed / moment
    assert not is_claimed(out)
    results, text = run_and_read(quick("train.checkpoint_every_steps=3"), out, resume=True)
    assert_same_end(out, uninterrupted_with_steps)
    if moment == "before_any_checkpoint":
        assert results["resumed"] == []
    else:
        assert "resumed after step" in text
        assert results["resumed"] == [{"step": final_step(text), "exact": True}]
    expected = {path.name for path in uninterrupted_with_steps.iterdir()}
    assert {path.name for path in out.iterdir()} == expected, "nothing half-written stays"


def test_a_run_begun_before_a_setting_came_up_goes_on(killed, uninterrupted_with_steps, tmp_path):
    out = copied(killed / "in_an_epoch-as-killed", tmp_path)
    lines = (out / "recipe.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.strip().startswith("late: ")]
    assert len(kept) == len(lines) - 1
    (out / "recipe.yaml").write_text("".join(kept))
    for path in out.glob("checkpoint*.pt"):
        state = torch.load(path, weights_only=True)
        state["identity"]["recipe"] = hashlib.blake2b("".join(kept).encode(), digest_size=16).hexdigest()
        torch.save(state, path)
    _, text = run_and_read(recipe_of(out), out, resume=True)
    assert "resumed after step" in text
    assert_same_end(out, uninterrupted_with_steps)
    assert (out / "recipe.yaml").read_text() == "".join(kept)


def final_step(text: str) -> int:
    return int(text.split("resumed after step ")[1].split()[0])


def test_where_to_save_makes_no_difference_to_the_end(uninterrupted, uninterrupted_with_steps):
    assert_same_end(uninterrupted, uninterrupted_with_steps)


def test_unfinished_runs_are_listed_with_what_to_do(killed, tmp_path):
    for name in ("in_an_epoch", "before_any_checkpoint"):
        shutil.copytree(killed / f"{name}-as-killed", tmp_path / name)
    with claim(tmp_path / "in_an_epoch"):
        early, late = unfinished_runs(tmp_path)
        assert late.state == "running"
    early, late = unfinished_runs(tmp_path)
    assert (late.epochs_done, late.epochs) == (1, 2)
    assert late.state == f"interrupted; continue with: genssl run --resume {tmp_path}/in_an_epoch"
    assert early.state.startswith("interrupted before its first checkpoint; begin again with: genssl run --resume")


# ---- What cannot be resumed ----


def test_a_finished_run_is_left_alone(uninterrupted):
    before = {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir()}
    results, text = run_and_read(quick(), uninterrupted, resume=True)
    assert "is finished; there is nothing to resume" in text
    assert results == json.loads((uninterrupted / "results.json").read_text())
    assert {path.name: path.stat().st_mtime_ns for path in uninterrupted.iterdir()} == before


def test_another_recipe_is_refused_by_what_differs(uninterrupted):
    with pytest.raises(
        UserError, match=r"begun with another recipe: seed 0 \(now: 1\)\. Of a run that goes on only train\.epochs can"
    ):
        run_and_read(quick("seed=1", "train.epochs=4"), uninterrupted, resume=True)


# ---- Another length ----

CONSTANT = ("schedule.name=constant", "train.keep_checkpoints=1")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The directory of a run of three epochs at a constant learning rate."""
    out = tmp_path_factory.mktemp("straight") / "three"
    run_and_read(quick(*CONSTANT, "train.epochs=3"), out)
    return out


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The directory of such a run of one epoch."""
    out = tmp_path_factory.mktemp("short") / "one"
    run_and_read(quick(*CONSTANT, "train.epochs=1"), out)
    return out


def copied(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "run"))


def test_a_lengthened_run_ends_as_one_that_was_as_long_from_the_beginning(short, straight, tmp_path):
    out = copied(short, tmp_path)
    results, text = run_and_read(quick(*CONSTANT, "train.epochs=3"), out, resume=True)
    assert_same_end(out, straight)
    assert results["resumed"] == [{"step": 5, "exact": True, "epochs_before": 1}]
    assert load(Recipe, out / "recipe.yaml").train.epochs == 3
    assert json.loads((out / "results-1-epochs.json").read_text()) == json.loads((short / "results.json").read_text())
    assert (out / "encoder-1-epochs.safetensors").read_bytes() == (short / "encoder.safetensors").read_bytes()
    again, text = run_and_read(quick(*CONSTANT, "train.epochs=3"), out, resume=True)
    assert again == results
    assert "is finished; there is nothing to resume" in text


def test_a_run_is_lengthened_more_than_once_and_where_it_was_interrupted(short, straight, tmp_path):
    out = copied(short, tmp_path)
    run_and_read(quick(*CONSTANT, "train.epochs=2"), out, resume=True)
    for name in ("results.json", "report.html", "encoder.safetensors"):  # as if it were killed before its end
        (out / name).unlink()
    run_and_read(quick(*CONSTANT, "train.epochs=3"), out, resume=True)
    assert_same_end(out, straight)
    assert load(Recipe, out / "recipe-begun.yaml").train.epochs == 1


@pytest.mark.parametrize("name", ["results.json", "report.html", "recipe-begun.yaml"])
def test_a_run_that_is_killed_while_it_gets_its_length_can_go_on(short, straight, tmp_path, name, monkeypatch):
    out = copied(short, tmp_path)
    replace, unlink = os.replace, Path.unlink

    def die(done, path):
        if Path(path).name == name:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(os, "replace", lambda one, other: die(replace(one, other), other if "begun" in name else one))
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: die(unlink(path, missing_ok), path))
    with pytest.raises(KeyboardInterrupt):
        run_and_read(quick(*CONSTANT, "train.epochs=3"), out, resume=True)
    monkeypatch.undo()
    assert load(Recipe, out / "recipe.yaml").train.epochs == 1
    run_and_read(quick(*CONSTANT, "train.epochs=3"), out, resume=True)
    assert_same_end(out, straight)


@pytest.mark.parametrize(
    ("settings", "epochs", "why"),
    [
        (["schedule.name=cosine"], 2, "its schedule is a cosine over 1 epochs, and after 1 of them"),
        (["method={name: byol}"], 2, "byol does in each step what depends on the part of the training that is done"),
        (["method={name: moco, momentum_end: 0.99, queue_size: 64}"], 2, None),
        (["schedule={name: constant, warmup_epochs: 0.5}"], 2, None),
    ],
    ids=["cosine", "byol", "moco", "warm-up"],
)
def test_only_what_does_not_depend_on_the_length_is_lengthened(tmp_path, settings, epochs, why):
    out = tmp_path / "run"
    run_and_read(quick(*CONSTANT, *settings, "train.epochs=1"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    longer = quick(*CONSTANT, *settings, f"train.epochs={epochs}")
    if why is None:
        run_and_read(longer, out, resume=True)
        run_and_read(longer, tmp_path / "straight")
        assert_same_end(out, tmp_path / "straight")
        return
    with pytest.raises(UserError) as caught:
        run_and_read(longer, out, resume=True)
    assert f"train.epochs cannot be changed from 1 to {epochs}: {why}" in str(caught.value)
    assert str(caught.value).endswith(f"genssl run {out}/recipe.yaml train.epochs={epochs}")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_is_not_made_shorter_than_it_is(straight):
    with pytest.raises(UserError, match=r"cannot be changed from 3 to 2: 3 are done\. Start a run of 2 "):
        run_and_read(quick(*CONSTANT, "train.epochs=2"), straight, resume=True)


def test_a_budget_is_of_the_whole_run(tmp_path, quick_recipe):
    recipe = quick_recipe("variants.late=reuse", "variants.budget=2", "schedule.name=constant")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    with pytest.raises(UserError, match=r"variants\.budget is spread over all epochs"):
        changed_length(of_length(recipe, 2), tmp_path, 1)


def test_the_checkpoint_of_another_recipe_is_refused(uninterrupted, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes((uninterrupted / "checkpoint.pt").read_bytes())
    with pytest.raises(UserError, match=r"checkpoint.pt is the checkpoint of another run: recipe \w+ \(now: \w+\)"):
        run_and_read(quick("seed=1"), out, resume=True)
    assert not (out / "metrics.jsonl").exists()


def test_a_directory_that_is_in_use_is_refused(tmp_path):
    out = tmp_path / "out"
    with claim(out):
        assert is_claimed(out)
        for resume in (False, True):
            with pytest.raises(
                UserError, match=rf"in use by another process \(number {os.getpid()}\); wait until it has"
            ):
                run_and_read(quick(), out, resume=resume)
    assert not is_claimed(out)
    assert list(out.iterdir()) == []


# ---- Signals ----


class Running:
    """`genssl run` in a process of its own."""

    def __init__(self, out: Path, *overrides: str) -> None:
        self.out = out
        command = [sys.executable, "-m", "genssl", "run", str(RECIPE), *overrides, "--resume", str(out)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, number: int) -> tuple[int, str, str]:
        """Sends a signal; returns the exit code and what was written."""
        self.process.send_signal(number)
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors


def test_sigterm_saves_the_step_and_says_how_to_go_on(killed, uninterrupted_with_steps):
    out = killed / "sigterm"
    assert (killed / "sigterm.err").read_text().strip() == "genssl: interrupted"
    assert (
        "stopped after step 7 of 10; continue with: genssl run --resume sigterm\n"
        in (killed / "sigterm.out").read_text()
    )
    assert final(out)["step"] == 7
    assert not is_claimed(out)
    run_and_read(quick("train.checkpoint_every_steps=3"), out, resume=True)
    assert_same_end(out, uninterrupted_with_steps)


@pytest.mark.slow
def test_sigterm_in_an_online_run_ends_exactly(tmp_path):
    online = [*QUICK, "evaluate=[]", "variants.batching=deterministic", "train.epochs=3"]
    run_and_read(load(Recipe, RECIPE, online), tmp_path / "whole")
    running = Running(tmp_path / "out", *online)
    running.wait_for(tmp_path / "out" / "checkpoint.pt")
    code, _, errors = running.end(signal.SIGTERM)
    assert code == 143, errors
    results, _ = run_and_read(load(Recipe, RECIPE, online), tmp_path / "out", resume=True)
    assert results["resumed"][0]["exact"]
    assert_same_end(tmp_path / "out", tmp_path / "whole")


# ---- With variants, and with every method ----


def kill_and_resume(tmp_path: Path, overrides: list[str]) -> dict:
    """Kills a real run with kill -9 some time after its first checkpoint, resumes it, and compares."""
    recipe = load(Recipe, RECIPE, overrides)
    run_and_read(recipe, tmp_path / "whole")
    running = Running(tmp_path / "out", *overrides)
    running.wait_for(tmp_path / "out" / "checkpoint.pt")
    assert running.end(signal.SIGKILL)[0] == -signal.SIGKILL
    results, _ = run_and_read(recipe, tmp_path / "out", resume=True)
    assert 0 < results["resumed"][0]["step"] < recipe.train.epochs * (1437 // recipe.train.batch_size)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("source", ["online", "in_process"])
def test_with_variants(tmp_path, source):
    overrides = [*QUICK, "evaluate=[]", f"variants.source={source}", "variants.batching=deterministic"]
    results = kill_and_resume(tmp_path, [*overrides, "views.probability=0.5", "train.epochs=3"])
    assert results["resumed"][0]["exact"]
    assert_same_end(tmp_path / "out", tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["ledger"]["distinct_variants"] == whole["ledger"]["distinct_variants"]


@pytest.mark.slow
def test_reuse_goes_on_and_says_that_it_is_not_exact(tmp_path):
    overrides = [*QUICK, "evaluate=[]", "variants.late=reuse", "train.epochs=4"]
    results = kill_and_resume(tmp_path, overrides)
    (resumed,) = results["resumed"]
    assert not resumed["exact"]
    assert resumed["because"].startswith("variants.late is reuse: which variants come late depends on time, and the po")
    steps = [json.loads(line).get("step") for line in (tmp_path / "out" / "assignments.jsonl").read_text().splitlines()]
    assert steps == [None, *range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.names())
def test_every_method_resumes_exactly(tmp_path, method):
    small = {name: 32 for name in METHODS.config(method).model_fields if name.endswith("_dim")}
    block = ", ".join(f"{name}: {value}" for name, value in {"name": method, **small}.items())
    overrides = [*QUICK, "evaluate=[]", "variants.source=none", "train.epochs=8", f"method={{{block}}}"]
    kill_and_resume(tmp_path, overrides)
    assert_same_end(tmp_path / "out", tmp_path / "whole")
