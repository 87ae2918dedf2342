"""A run that fails before its first step leaves its directory as it was, and what a killed one left is taken up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from short_runs import run_and_read, without_pictures

from genssl.base.files import claim
from genssl.errors import UserError
from genssl.training.run_directory import hold, holds_run

ROOT = Path(__file__).resolve().parents[2]
NONE = "variants.source=none"


@pytest.fixture
def no_pictures(monkeypatch):
    without_pictures(monkeypatch)


FAILURES = {
    "no data": ["dataset={name: folder, root: /nowhere}"],
    "no server": ["variants.server=127.0.0.1:1"],
    "no token": ["variants.server=127.0.0.1:1", "variants.token_file=/nowhere"],
    "no generator": ["generator.model=/nowhere", "variants.source=in_process"],
    "no generator in the server": ["generator.model=/nowhere"],
    "no store": ["variants.source=stored", "variants.store=/nowhere"],
    "no log to replay": ["variants.replay=/nowhere", "variants.source=in_process"],
    "a batch too large": ["train.batch_size=2000"],
    "an evaluator that cannot judge": [NONE, "evaluate=[{name: few_shot, labels_per_class: 500}]"],
    "no number for a loss": [NONE, "optimizer={name: sgd, lr: 1.0e+38}", "method.temperature=1.0e-38"],
}


CASES = [
    *((failure, False) for failure in FAILURES if failure != "no generator in the server"),
    ("no server", True),
    ("no number for a loss", True),
]


@pytest.mark.parametrize(
    ("failure", "resume"), CASES, ids=lambda value: value if isinstance(value, str) else f"{value}"
)
def test_a_failed_start_leaves_nothing(failure, resume, tmp_path, quick_recipe, monkeypatch):
    monkeypatch.setattr("genssl.client.balancer.CONNECT_SECONDS", 0.5)
    recipe = quick_recipe(*FAILURES[failure])
    with pytest.raises(UserError):
        run_and_read(recipe, tmp_path / "new" / "out", resume=resume)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        run_and_read(recipe, tmp_path / "out", resume=resume)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_server_that_cannot_load_its_generator_takes_its_log_with_it(tmp_path, quick_recipe):
    with pytest.raises(UserError, match=r"generator\.model: '/nowhere' is neither a folder here"):
        run_and_read(quick_recipe(*FAILURES["no generator in the server"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_first_step_leaves_nothing(tmp_path, quick_recipe, monkeypatch):
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("genssl.training.update.Update.__call__", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_and_read(quick_recipe(NONE), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path, quick_recipe):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--out .*file/out: cannot be created \(Not a directory\)$"):
        run_and_read(quick_recipe(NONE), tmp_path / "file" / "out")


LEFTOVERS = {
    "recipe.yaml": "name: another\n",
    "server.log": "killed\n",
    "metrics.jsonl": "",
    "assignments.jsonl": '{"format": "genssl-assignments/1"}\n',
    ".lock": "1\n",
}


@pytest.mark.parametrize("resume", [False, True], ids=["", "resume"])
def test_what_a_killed_start_left_is_taken_up(tmp_path, quick_recipe, resume, no_pictures):
    out = tmp_path / "out"
    out.mkdir()
    for name, text in LEFTOVERS.items():
        (out / name).write_text(text)
    assert run_and_read(quick_recipe(NONE, "evaluate=[]"), out, resume=resume)[0]["resumed"] == []
    assert "simclr-sd-digits" in (out / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", ["results.json", "checkpoint.pt", "checkpoint-12.pt", "checkpoint-best.pt"])
def test_a_directory_with_something_to_lose_is_left_alone(tmp_path, quick_recipe, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="holds a run already; give another directory with --out, or remove it"):
        run_and_read(quick_recipe(NONE), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_row_of_the_log_is_something_to_lose(tmp_path):
    assert not holds_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert not holds_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"epoch": 1}) + "\n")
    assert holds_run(tmp_path)


def test_a_run_of_another_process_is_not_removed(tmp_path, quick_recipe):
    out = tmp_path / "out"
    with claim(out):
        (out / "recipe.yaml").write_text("theirs")
        with pytest.raises(UserError, match="is in use by another process"), hold(out, resume=False):
            raise AssertionError
        assert (out / "recipe.yaml").read_text() == "theirs"
    (out / "checkpoint.pt").touch()  # it has ended, between the look at the directory and the lock
    with pytest.raises(UserError, match="holds a run already"), hold(out, resume=False):
        raise AssertionError
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "checkpoint.pt"}


def test_what_others_put_there_meanwhile_stays(tmp_path):
    out = tmp_path / "new" / "out"
    with hold(out, resume=False):
        for name in ("server.log", "metrics.jsonl", "tensorboard/events", "paper/draft.tex", "run/metrics.jsonl"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).touch()
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert left == {"paper/draft.tex", "run/metrics.jsonl"}


def test_a_run_that_has_begun_stays(tmp_path, quick_recipe):
    def begun() -> None:
        with hold(tmp_path / "out", resume=False) as directory:
            directory.begin(quick_recipe(NONE))
            raise UserError("later")

    with pytest.raises(UserError, match="later"):
        begun()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recipe.yaml"]


SIMULTANEOUS = """
import datetime, sys, time
from genssl.cli import folders

class Now(datetime.datetime):
    @classmethod
    def now(cls):
        return cls(2026, 1, 1)

folders.datetime = Now
with folders.new_folder(folders.Path("runs"), "mine") as folder:
    (folder / "file").touch()
    print(folder)
"""


def test_of_runs_that_start_in_one_second_each_gets_a_folder(tmp_path):
    command = [sys.executable, "-c", SIMULTANEOUS]
    started = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=120) for process in started]
    folders = sorted(out.strip() for out, _ in said)
    assert folders == ["runs/mine-20260101-000000", *(f"runs/mine-20260101-000000-{n}" for n in (2, 3, 4))], said
