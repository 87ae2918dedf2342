"""What a person sees of a run: in 80 columns on a terminal, and as lines now and then in a file."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from genssl.training.progress import LINE_SECONDS, RunProgress, duration
from genssl.variants.ledger import Ledger


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def ledger_of(recipe) -> Ledger:
    """A ledger in which everything happens that is shown, at its widest."""
    ledger = Ledger()
    for index, origin in enumerate(["generated"] * 2 + ["reused", "real"]):
        ledger.deliver(bytes([index]) * 16, index, origin, index)
    ledger.stall_seconds = 9.0
    return ledger


def shown(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=80, color_system=None, highlight=False), text


def screens(text: str) -> list[str]:
    """Returns what stood on the terminal after each update, without its control codes."""
    return [part.strip("\r\n") for part in re.split(r"(?:\r?\x1b\[[0-9;]*[A-Zhl])+|\x1b\[\?25[hl]", text)]


def test_a_long_run_fits_into_80_columns_and_evaluation_has_a_bar_of_its_own(quick_recipe):
    recipe = quick_recipe("train.epochs=1000", "evaluate=[knn, linear_probe, semantic_consistency]")
    console, text = shown(terminal=True)
    with RunProgress(console) as progress:
        progress.start(recipe, steps_per_epoch=10_000, done=9_999_998)
        progress.step(999, 12.345, images=10**9, seconds=10_000, ledger=ledger_of(recipe))
        progress._bar.refresh()
        training = screens(text.getvalue())[-1]
        for config in recipe.evaluate:
            progress.evaluating(config.name)
            progress._bar.refresh()
        last = screens(text.getvalue())[-1]
        progress.evaluated()
        progress._bar.refresh()
        end = screens(text.getvalue())[-1]
    bar, facts = training.splitlines()
    assert bar.startswith("epoch 1000/1000 ")
    assert "9999999/10000000" in bar
    assert facts == "  loss 12.345  100,000 images/s  fresh 50%  reused 25%  real 25%  stall 0%"
    trained, evaluating, name = last.splitlines()
    assert trained.startswith("trained ")
    assert evaluating.startswith("evaluating ")
    assert name == "  semantic_consistency"
    assert "2/3" in evaluating
    assert "left" not in evaluating, "one evaluator does not tell how long another takes"
    assert end.splitlines()[-1].startswith("evaluated ")
    assert all(len(line) <= 80 for screen in screens(text.getvalue()) for line in screen.splitlines())
    assert "\u2026" not in text.getvalue(), "nothing is cut"


def test_a_file_gets_a_line_an_epoch_and_one_now_and_then_in_a_long_one(quick_recipe):
    recipe, clock = quick_recipe("train.epochs=2", "variants.source=none"), Clock()
    console, text = shown(terminal=False)
    with RunProgress(console, clock=clock) as progress:
        progress.start(recipe, steps_per_epoch=4)
        for step in range(8):
            clock.now += LINE_SECONDS / 2 if step < 4 else 1.0
            progress.step(step // 4, 1.0, images=128, seconds=1.0, ledger=Ledger())
        progress.evaluating("knn")
        progress.evaluated()
    assert text.getvalue().splitlines() == [
        "epoch 1/2 step 2/4  loss 1.000  128 images/s  3 min 0 s left",
        "epoch 1/2  loss 1.000  128 images/s  2 min 0 s left",
        "epoch 2/2  loss 1.000  128 images/s",
        "evaluating knn",
    ]


def test_a_run_that_goes_on_is_as_fast_as_it_is_now(quick_recipe):
    clock = Clock()
    console, text = shown(terminal=False)
    progress = RunProgress(console, clock=clock)
    progress.start(quick_recipe("train.epochs=10", "variants.source=none"), steps_per_epoch=1, done=8)
    clock.now += 30
    progress.step(8, 1.0, images=9, seconds=1.0, ledger=Ledger())
    assert text.getvalue() == "epoch 9/10  loss 1.000  9 images/s  30 s left\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_start_says_device_images_steps_and_directory(quick_recipe, terminal):
    recipe = quick_recipe("train.epochs=20", "train.batch_size=128")
    console, text = shown(terminal)
    folder = Path("runs") / "a-long-name-of-a-folder-on-a-disk-[of-mine]" / "simclr-sd-digits-20260101-000000"
    with RunProgress(console) as progress:
        progress.announce(recipe, 1437, 11, "cpu (2 threads)", folder)
    assert f"simclr-sd-digits on cpu (2 threads), into {folder}" in text.getvalue(), "a path is there to be copied"
    assert (
        "1,437 images, of which 29 sit out each epoch; 220 steps: 20 epochs of 11, 128 images each" in text.getvalue()
    )
    with RunProgress(console) as progress:
        progress.announce(recipe, 1408, 11, "cuda (NVIDIA H200)", folder)
    assert "1,408 images; 220 steps" in text.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(3.2, "3 s"), (250, "4 min 10 s"), (222_000, "61 h 40 min")])
def test_durations(seconds, words):
    assert duration(seconds) == words
