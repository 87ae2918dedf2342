"""Looking at a generator while it is trained: what is seen, that it changes nothing, and when it ends a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import FLOW, ICGAN, UNCLIP, judge_little, problems, quiet, recipe
from PIL import Image

from genssl.base.ranks import ALONE
from genssl.config.generator_recipes.base import WatchConfig
from genssl.data.load import Subset, hold_out
from genssl.errors import ConfigError
from genssl.generator_training.loop import Checkpoints
from genssl.generator_training.run import train_generator
from genssl.generator_training.watching import Watch
from genssl.generators.configs import FlowConfig

HELD_OUT = "validation_fraction: 0.5\n"
WATCHED = HELD_OUT + "monitor: {every_steps: 4, sources: 32}\n"


@pytest.fixture(autouse=True)
def little_to_judge(monkeypatch) -> None:
    judge_little(monkeypatch)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def records(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "progress.json").read_text())


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        pytest.param(FLOW, "flow", id="flow"),
        pytest.param(ICGAN, "icgan", id="icgan", marks=pytest.mark.slow),
        pytest.param(UNCLIP, "denoiser", id="stable_unclip", marks=pytest.mark.slow),
    ],
)
def test_looks_are_recorded_and_change_nothing(tmp_path, text, stage):
    train_generator(recipe(text + HELD_OUT), tmp_path / "unseen", quiet())
    train_generator(recipe(text + WATCHED), tmp_path / "seen", quiet())
    assert weights(tmp_path / "seen") == weights(tmp_path / "unseen")
    assert [record["step"] for record in records(tmp_path / "seen")] == [4, 6], "every fourth step, and the last"
    assert all(record["frechet"] > record["frechet_of_real"] > 0 for record in records(tmp_path / "seen"))
    grids = sorted((tmp_path / "seen" / "progress").iterdir())
    assert [path.name for path in grids] == [f"{stage}-0000004.png", f"{stage}-0000006.png"]
    first = np.asarray(Image.open(grids[0]))
    assert first.shape[0] > 500
    assert first.std() > 10
    card = json.loads((tmp_path / "seen" / "card.json").read_text())
    assert card["progress"] == {"kept_step": 6, "looks": records(tmp_path / "seen"), "held_out": True}
    assert not list((tmp_path / "seen").glob(".*")), "nothing of the making is left"


def test_without_a_held_out_part_train_images_are_looked_at_and_the_card_says_so(tmp_path):
    train_generator(recipe(FLOW + "monitor: {every_steps: 6, sources: 32}\n"), tmp_path / "out", quiet())
    assert json.loads((tmp_path / "out" / "card.json").read_text())["progress"]["held_out"] is False


def test_patience_may_not_choose_by_images_that_train_or_test():
    assert problems(FLOW + "monitor: {patience: 2}\n") == [
        "miniature.yaml:8: monitor: patience chooses weights, which neither training nor test images may do; set "
        "validation_fraction above 0, or leave patience out"
    ]


def test_too_few_images_are_said_before_the_training(digits_test, tmp_path):
    few = Subset(digits_test, np.arange(3))
    with pytest.raises(ConfigError, match=r"monitor: 3 images are too few to compare; give four or more, or leave it"):
        Watch(WatchConfig(), few, torch.device("cpu"), 0, tmp_path)


class Scripted(Watch):
    """Measures for real, and then reports distances that are written down, since no training worsens on command."""

    distances: tuple[float, ...] = ()

    def _measure(self, step, average, publish):
        measured = super()._measure(step, average, publish)
        return measured | {"frechet": self.distances[len(self.records)], "measured": measured["frechet"]}


def test_patience_ends_a_training_and_keeps_the_best_weights(tmp_path, monkeypatch, digits_train):
    monkeypatch.setattr("genssl.generator_training.run.Watch", Scripted)
    monkeypatch.setattr(Scripted, "distances", (5.0, 3.0, 4.0, 3.0, 1.0))
    text = FLOW.replace("steps: 6", "steps: 400") + HELD_OUT + "monitor: {every_steps: 3, sources: 32, patience: 2}\n"
    console = quiet()
    train_generator(recipe(text), tmp_path / "out", console)
    assert "step 12: no better for 2 looks; back to step 6" in console.file.getvalue()  # type: ignore[attr-defined]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["progress"]["kept_step"] == 6
    assert [look["step"] for look in card["progress"]["looks"]] == [3, 6, 9, 12]
    # What was published is what was seen after step 6: it has that look's distance, to the last digit.
    watch = Watch(WatchConfig(sources=32), hold_out(digits_train, 0.5)[1], torch.device("cpu"), 0, tmp_path)
    watch.begin("flow")
    found = watch._measure(0, torch.nn.Identity(), lambda *_: FlowConfig(model=str(tmp_path / "out")))
    measured = [look["measured"] for look in card["progress"]["looks"]]
    assert found["frechet"] == measured[1]
    assert len(set(measured)) == 4


@pytest.mark.slow
def test_a_flow_and_its_student_are_looked_at_apart(tmp_path, monkeypatch):
    """Distances of the one say nothing about the other, nor are its weights the other's."""
    monkeypatch.setattr("genssl.generator_training.run.Watch", Scripted)
    monkeypatch.setattr(Scripted, "distances", (2.0, 1.0, 9.0, 8.0))
    distil = "distill: {training_steps: 4, batch_size: 16, teacher_steps: 2}\n"
    text = FLOW.replace("steps: 6", "steps: 4") + HELD_OUT + "monitor: {every_steps: 2, sources: 32, patience: 1}\n"
    train_generator(recipe(text + distil), tmp_path / "out", quiet())
    seen = records(tmp_path / "out")
    assert [(look["stage"], look["step"]) for look in seen] == [
        ("flow", 2),
        ("flow", 4),
        ("distill", 2),
        ("distill", 4),
    ]
    assert json.loads((tmp_path / "out" / "card.json").read_text())["progress"]["kept_step"] == 4
    monkeypatch.setattr(Scripted, "distances", (2.0, 1.0, 9.0, 10.0))
    train_generator(recipe(text + distil), tmp_path / "other", quiet())
    assert json.loads((tmp_path / "other" / "card.json").read_text())["progress"]["kept_step"] == 2
    assert weights(tmp_path / "other")["unet.safetensors"] != weights(tmp_path / "out")["unet.safetensors"]


def test_an_interrupted_training_remembers_what_was_seen(tmp_path, monkeypatch):
    text = FLOW + HELD_OUT + "monitor: {every_steps: 2, sources: 32, patience: 3}\n"
    train_generator(recipe(text), tmp_path / "whole", quiet())
    monkeypatch.setattr(Checkpoints.__init__, "__defaults__", (0.0, ALONE))
    look = Watch.look

    def interrupted(self, step, *arguments):
        if step == 6:
            raise KeyboardInterrupt
        return look(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "look", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_generator(recipe(text), tmp_path / "cut", quiet())
    train_generator(recipe(text), tmp_path / "cut", quiet())
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
