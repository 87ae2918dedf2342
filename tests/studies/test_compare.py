"""A whole study: real runs, a real store, paired figures, an A/A control that is exactly zero, and going on."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genssl.config.load import load_study
from genssl.errors import UserError
from genssl.studies.compare import compare
from genssl.studies.model import Summary
from genssl.studies.summarise import StudyRun

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "recipes" / "online_vs_offline.yaml"

STUDY = f"""
name: small
title: A small study
recipe: {ROOT / "recipes" / "simclr_sd.yaml"}
set: {{train.epochs: 1, schedule.warmup_epochs: 0, backbone.width: 4, train.threads: 1, train.batch_size: 256,
      evaluate: [{{name: knn}}], variants.source: in_process, variants.per_image: 2}}
seeds: [0, 1]
metric: knn/top1
reference: none
against: [none, stored-2]
headline: [in-process, stored-2]
arms:
  - {{name: none, label: No variants, set: {{variants.source: none}}, paper: imagenet_linear.simclr.none}}
  - {{name: stored-2, set: {{variants.source: stored}}, paper: imagenet_linear.simclr.stable_diffusion}}
  - {{name: in-process}}
  - {{name: control, control_of: stored-2, against: [stored-2]}}
  - {{name: longer, wall_clock_of: in-process, set: {{variants.source: none}}, against: [none]}}
"""


class Watcher:
    """Keeps what it is told; after `stop_after` new runs it is interrupted."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.notes: list[str] = []
        self.anew: list[tuple[str, int]] = []
        self.there: list[tuple[str, int]] = []
        self.stop_after = stop_after

    def note(self, text: str) -> None:
        self.notes.append(text)

    def running(self, arm: str, seed: int):
        from rich.console import Console

        from genssl.training.progress import RunProgress

        return RunProgress(Console(quiet=True))

    def skipped(self, arm: str, seed: int, why: str) -> None:
        self.notes.append(f"{arm}: {why}")

    def finished(self, run: StudyRun, *, anew: bool) -> None:
        (self.anew if anew else self.there).append((run.arm, run.seed))
        if len(self.anew) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def done(study, tmp_path_factory) -> tuple[Path, Summary, Watcher, Watcher]:
    """The study, interrupted after its third run and started again."""
    out = tmp_path_factory.mktemp("out") / "small"
    first, second = Watcher(stop_after=3), Watcher()
    with pytest.raises(KeyboardInterrupt):
        compare(load_study(study), out, first)
    assert not (out / "summary.json").exists()
    # What a killed run leaves behind.
    partial = out / "runs" / "control" / "seed-0"
    partial.mkdir(parents=True)
    (partial / "metrics.jsonl").write_text("{}\n")
    return out, compare(load_study(study), out, second), first, second


def test_finished_runs_are_not_repeated(done):
    _, _, first, second = done
    assert first.anew == second.there
    assert len(first.anew) == 3
    assert len(second.anew) == 7


def test_the_store_is_filled_once(done):
    out, summary, first, second = done
    assert sum("variants of each image" in note for note in first.notes + second.notes) == 1
    (store,) = summary.stores
    assert (store.variants_per_image, store.variants) == (2, 2 * 1437)
    assert (out / store.directory).is_dir()
    assert summary.arm("stored-2").cost.generator_calls == 2 * 1437
    assert summary.arm("stored-2").cost.store_bytes == pytest.approx(store.bytes, rel=0.01)


def test_the_a_a_control_is_exactly_zero(done):
    _, summary, _, _ = done
    control = summary.controls["a_a"]
    assert (control.arm, control.of) == ("control", "stored-2")
    assert control.max_abs_difference == 0
    assert control.encoders_equal
    # Nothing was made for it: its variants are the stored ones.
    assert summary.arm("control").cost.generator_calls == 0
    assert summary.arm("control").cost.distinct_variants == summary.arm("stored-2").cost.distinct_variants > 0


def test_other_arms_do_differ(done):
    """A control that is zero says little if everything is."""
    out, summary, _, _ = done
    losses = {
        arm.name: (out / arm.runs[0].directory / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0]
        for arm in summary.arms
    }
    assert losses["control"] == losses["stored-2"] != losses["none"]


def test_summary_json_is_the_summary(done):
    out, summary, _, _ = done
    written = json.loads((out / "summary.json").read_text())
    assert written["controls"]["a_a"]["max_abs_difference"] == 0
    assert Summary.model_validate(written) == summary


def test_figures_are_those_of_the_runs(done):
    out, summary, _, _ = done
    for arm in summary.arms:
        values = []
        for run in arm.runs:
            results = json.loads((out / run.directory / "results.json").read_text())
            values.append(results["metrics"]["knn/top1"])
        assert arm.metrics["knn/top1"].mean == pytest.approx(sum(values) / 2)
    none, stored = summary.arm("none"), summary.arm("stored-2")
    difference = stored.differences["none"]["knn/top1"]
    assert difference.mean == pytest.approx(stored.metrics["knn/top1"].mean - none.metrics["knn/top1"].mean)
    assert difference.n == 2
    assert stored.paper.differences == {"none": 6.2}


def test_steps_are_equal_but_where_the_wall_clock_is(done):
    _, summary, _, _ = done
    steps = {arm.name: {run.steps for run in arm.runs} for arm in summary.arms}
    assert all(found == {5} for name, found in steps.items() if name != "longer")
    longer, given = summary.arm("longer"), summary.arm("in-process")
    assert longer.equal == "wall_clock"
    own = summary.arm("none")
    for run, other, alike in zip(longer.runs, given.runs, own.runs, strict=True):
        a_epoch = alike.cost.wall_clock_seconds / alike.epochs
        assert run.epochs == int(other.cost.wall_clock_seconds / a_epoch)


def test_the_verdict_begins_with_the_question(done):
    _, summary, _, _ = done
    assert summary.verdict[0].startswith("in-process against stored-2, at equal optimiser steps: ")
    assert any(sentence.startswith("Control: control equals stored-2 exactly") for sentence in summary.verdict)
    assert summary.cautions


def test_another_study_is_refused(done, tmp_path):
    out, *_ = done
    changed = tmp_path / "study.yaml"
    changed.write_text(STUDY.replace("name: small", "name: other"))
    with pytest.raises(UserError, match="holds runs of the study 'small', not of 'other'"):
        compare(load_study(changed), out, Watcher())


def test_a_study_may_gain_an_arm_and_lose_a_seed(done, tmp_path):
    there, before, *_ = done
    out = Path(shutil.copytree(there, tmp_path / "moved"))
    changed = tmp_path / "study.yaml"
    added = "  - {name: one, label: One, set: {variants.source: stored, variants.per_image: 1}}\n"
    changed.write_text(STUDY + added)
    watcher = Watcher()
    summary = compare(load_study(changed, seeds=[0]), out, watcher)
    assert watcher.anew == [("one", 0)]
    assert len(watcher.there) == len(before.arms)
    assert summary.arm("one").cost.generator_calls == 1437  # its share of the two that are stored
    assert summary.arm("none").metrics["knn/top1"].mean == before.arm("none").runs[0].metrics["knn/top1"]


def test_a_finished_run_does_not_stand_for_an_arm_that_has_changed(done, tmp_path):
    """Another source of variants is another arm; its run is made anew, and the other one kept, with a reason."""
    there, before, *_ = done
    out = Path(shutil.copytree(there, tmp_path / "moved"))
    changed = tmp_path / "study.yaml"
    changed.write_text(STUDY.replace("- {name: in-process}", "- {name: in-process, set: {variants.source: none}}"))
    watcher = Watcher()
    summary = compare(load_study(changed, seeds=[0]), out, watcher)
    assert ("in-process", 0) in watcher.anew
    assert {arm for arm, _ in watcher.there} >= {"none", "stored-2", "control"}
    run = json.loads((out / "runs" / "in-process" / "seed-0" / "results.json").read_text())
    assert run["provenance"]["variants"]["source"] == "none"
    assert run["ledger"]["variants_computed"] == 0
    arm = summary.arm("in-process")
    assert arm.metrics["knn/top1"].mean == summary.arm("none").metrics["knn/top1"].mean, "now the same run"
    assert arm.cost.generator_calls == 0 < before.arm("in-process").cost.generator_calls
    said = 'in-process, seed 0: is run anew; the finished run had other settings: variants.source "in_process"'
    assert any(note.startswith(f'{said} (now: "none")') for note in watcher.notes)
    kept = out / "replaced" / "in-process" / "seed-0"
    assert (kept / "results.json").read_bytes() == (there / "runs/in-process/seed-0/results.json").read_bytes()
    assert any(line.startswith(said) for line in summary.provenance["run_anew"])
    assert said in html.unescape((out / "report.html").read_text())
    again = Watcher()
    assert compare(load_study(changed, seeds=[0]), out, again).provenance == summary.provenance
    assert again.anew == []


def test_an_arm_whose_time_is_too_short_is_left_out_and_said_to_be(done, tmp_path):
    there, before, *_ = done
    out = Path(shutil.copytree(there, tmp_path / "moved"))
    # Nothing fits into the time that the arm without variants takes, least of all with variants to be made first.
    added = "  - {name: hurried, wall_clock_of: none, set: {variants.source: stored}, against: [none]}\n"
    changed = tmp_path / "study.yaml"
    changed.write_text(STUDY.replace("against: [none, stored-2]", "against: [none, stored-2, hurried]") + added)
    watcher = Watcher()
    summary = compare(load_study(changed), out, watcher)
    assert watcher.anew == []
    assert [arm.name for arm in summary.arms] == [arm.name for arm in before.arms]
    assert any(note.startswith("hurried: ") for note in watcher.notes)
    assert any(caution.startswith("hurried is left out") for caution in summary.cautions)
    assert (out / "report.html").is_file()


def test_other_settings_on_the_command_line_are_refused(done, study):
    out, *_ = done
    with pytest.raises(UserError, match="holds a finished run of other settings"):
        compare(load_study(study, ["optimizer.lr=0.001"]), out, Watcher())


def test_a_folder_with_something_else_is_refused(study, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no study"):
        compare(load_study(study), tmp_path, Watcher())


def test_a_study_whose_first_run_cannot_start_leaves_nothing(study, tmp_path):
    broken = load_study(study, ["dataset={name: folder, root: /nowhere}"])
    with pytest.raises(UserError, match=r"arm none, seed 0: dataset\.root: /nowhere does not exist"):
        compare(broken, tmp_path / "studies" / "new", Watcher())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="/nowhere does not exist"):
        compare(broken, tmp_path / "there", Watcher())
    assert list((tmp_path / "there").iterdir()) == []


def test_what_a_killed_start_left_is_taken_up_by_any_study(study, tmp_path):
    (tmp_path / "runs" / "none").mkdir(parents=True)
    (tmp_path / "study.yaml").write_text("name: other\n")
    (tmp_path / ".lock").touch()
    with pytest.raises(KeyboardInterrupt):
        compare(load_study(study), tmp_path, Watcher(stop_after=1))
    assert "name: small" in (tmp_path / "study.yaml").read_text()
    assert (tmp_path / "runs" / "none" / "seed-0" / "results.json").is_file(), "what has begun stays"


def test_two_at_once_are_refused(done, study):
    import fcntl

    out, *_ = done
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is in use by another process; wait until it has ended"):
            compare(load_study(study), out, Watcher())


def test_an_unknown_cell_of_the_paper_is_told_before_anything_runs(study, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("imagenet_linear.simclr.none", "imagenet_linear.simclr.nun"))
    with pytest.raises(UserError, match="did you mean 'none'"):
        compare(load_study(path), tmp_path / "out", Watcher())
    assert not (tmp_path / "out").exists()


def test_the_command_line_tells_mistakes_in_one_message(tmp_path):
    for arguments, said in (
        (["compare", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["compare", str(SHIPPED), "--seeds", "0,0"], "--seeds: '0,0' is not a list of seeds"),
        (["compare", str(SHIPPED), "train.epohcs=3"], "did you mean 'epochs'"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "genssl", *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 2, result.stderr
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_shipped_study_in_its_short_form(tmp_path):
    """All of it, by the command that the README shows; killed once in the middle of a run, and started again."""
    out = tmp_path / "quick"
    command = [sys.executable, "-m", "genssl", "compare", str(SHIPPED), "--quick", "--out", str(out)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        while not list(out.glob("runs/stored-10/seed-0/metrics.jsonl")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/results.json")}
    assert before
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    summary = Summary.model_validate_json((out / "summary.json").read_text())
    assert summary.controls["a_a"].max_abs_difference == 0
    assert summary.controls["a_a"].encoders_equal
    assert summary.quick
    online, stored, budget = (summary.arm(name).cost for name in ("online", "stored-10", "online-10"))
    epochs = summary.arm("online").runs[0].epochs
    assert online.generator_calls == online.distinct_variants == epochs * 11 * 128
    assert stored.generator_calls == 14370
    assert budget.generator_calls <= 14370
    assert (out / "report.html").stat().st_size > 10_000
    assert "report.html has the whole of it" in result.stdout
