"""What is said while a generator is trained and measured."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from genssl.generator_training.stage_progress import StageProgress


def test_a_log_shows_rate_and_time_left_a_line_a_fifth_and_a_minute():
    now, said = [0.0], io.StringIO()
    with StageProgress(Console(file=said, width=200), lambda: now[0]) as progress:
        for step in range(11, 101):  # taken up after ten steps, which say nothing of the rate
            progress("flow", step, 100, 0.5, 64)
            now[0] += 2.0
        for done in range(64, 501, 109):  # no batch ends at a fifth
            progress.measuring("measuring: setting 1 of 1", done, 500)
            now[0] += 20.0
    lines = said.getvalue().splitlines()
    assert lines[0] == "flow: step 20/100, loss 0.5000, 32 images/s, 2 min 40 s left"
    assert lines[1] == "flow: step 40/100, loss 0.5000, 32 images/s, 2 min 0 s left"
    assert lines[4] == "flow: step 100/100, loss 0.5000, 32 images/s, 0 s left"
    assert lines[5:] == [f"measuring: setting 1 of 1, {left} left" for left in ("1 min 0 s", "40 s", "20 s", "0 s")]

    slow = io.StringIO()
    with StageProgress(Console(file=slow, width=200), lambda: now[0]) as progress:
        for step in range(1, 8):
            progress("flow", step, 100_000, 0.5, 64)
            now[0] += 25.0
    assert [line.split(",")[0] for line in slow.getvalue().splitlines()] == [
        "flow: step 4/100000", "flow: step 7/100000",
    ]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 3])
def test_a_terminal_has_a_bar_with_the_same_facts(steps):
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=200)
    now = [0.0]
    with StageProgress(console, lambda: now[0]) as progress:
        for step in range(1, steps + 1):
            progress("flow", step, 3, 0.25, 64)
            now[0] += 2.0
    assert "loss 0.2500" in said.getvalue()
    assert ("32 images/s" in said.getvalue()) == (steps > 1)
