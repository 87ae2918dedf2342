"""The assignment log: written as it was, read back as it was, refused where it does not belong."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from genssl.errors import UserError
from genssl.variants.plan import ViewPlan
from genssl.variants.replay import AssignmentLog, Replay
from genssl.variants.source import REAL, Delivery

HEADER = {"dataset": "digits", "seed": 3, "parameters": {"noise_level": 300.0}}


def view_plan() -> ViewPlan:
    return ViewPlan(seed=3, num_sources=12, batch_size=4, policy="both", probability=0.5, per_image="fresh")


def deliveries(plan: ViewPlan, epochs: int = 2):
    """Yields (step of the run, origins, indices), with every origin in turn."""
    for number in range(epochs * plan.steps_per_epoch):
        planned = plan.step(*divmod(number, plan.steps_per_epoch)).indices
        origins = [("generated", "reused", "real", "store")[slot % 4] for slot in range((planned != REAL).sum())]
        indices = [
            {"reused": 1000 + number, "real": REAL}.get(origin, int(index))
            for origin, index in zip(origins, planned[planned != REAL], strict=True)
        ]
        yield number, origins, indices


@pytest.fixture
def path(tmp_path):
    with AssignmentLog(tmp_path / "assignments.jsonl", HEADER) as log:
        for entry in deliveries(view_plan()):
            log.write(*entry)
    return tmp_path / "assignments.jsonl"


def test_a_replay_plans_what_was_delivered(path):
    plan, replay = view_plan(), Replay(view_plan(), path, HEADER, 6)
    assert replay.steps_per_epoch == 3
    for number, origins, indices in deliveries(plan):
        planned, replayed = plan.step(*divmod(number, 3)), replay.step(*divmod(number, 3))
        slots = planned.indices != REAL
        assert np.array_equal(replayed.rows, planned.rows)
        assert replayed.indices[slots].tolist() == indices
        assert (replayed.indices[~slots] == REAL).all()
        assert replay.slots(number).tolist() == slots.nonzero()[0].tolist()
        made = [index for index in indices if index != REAL]
        delivery = Delivery(np.zeros((len(made), 3, 8, 8), np.uint8), ["generated"] * len(made), made)
        again, same = replay.relabelled(number, delivery)
        assert same == indices
        assert again == ["generated" if origin == "store" else origin for origin in origins]


def test_a_step_without_variants_to_fetch_is_replayed_too(tmp_path):
    with AssignmentLog(tmp_path / "log", HEADER) as log:
        plan = view_plan()
        for number in range(3):
            count = int((plan.step(0, number).indices != REAL).sum())
            log.write(number, ["real"] * count, [REAL] * count)
    replay = Replay(view_plan(), tmp_path / "log", HEADER, 3)
    assert (replay.step(0, 1).indices == REAL).all()
    assert set(replay.relabelled(1, None)[0]) == {"real"}


def test_a_log_of_another_plan_names_both(path):
    with pytest.raises(UserError, match=r"log of another plan: seed 3 \(this recipe: 4\)"):
        Replay(view_plan(), path, HEADER | {"seed": 4}, 6)


def test_a_log_that_ends_early_says_where(path):
    with pytest.raises(UserError, match=r"ends before step 6, but this recipe has 9 steps"):
        Replay(view_plan(), path, HEADER, 9)


def test_half_a_last_line_is_left_out(path):
    whole = path.read_text()
    path.write_text(whole[:-20])
    Replay(view_plan(), path, HEADER, 5)
    with pytest.raises(UserError, match="ends before step 5"):
        Replay(view_plan(), path, HEADER, 6)


def test_a_log_of_the_first_step_only_is_too_short(tmp_path):
    AssignmentLog(tmp_path / "log", HEADER).__exit__(None, None, None)
    with pytest.raises(UserError, match="ends before step 0"):
        Replay(view_plan(), tmp_path / "log", HEADER, 6)


def test_another_number_of_slots_is_refused(path):
    lines = path.read_text().splitlines()
    lines[1] = '{"step":0,"origins":"g","indices":[1]}'
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"step 0 has 1 variants and this recipe wants \d+ there"):
        Replay(view_plan(), path, HEADER, 6).step(0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("not a log\n", r"log:1 is not a line of an assignment log"),
        ('{"format": "genssl-assignments/9"}\n', r"log:1 is not a line"),
        (
            '{"format": "genssl-assignments/1"}\n{"step": 0, "origins": "gg", "indices": [1]}\n{"x": 1}\n',
            r"log:2 is no",
        ),
        ('{"format": "genssl-assignments/1"}\n{"step": 0, "origins": "z", "indices": [1]}\n{"x": 1}\n', r"log:2 is no"),
        (
            '{"format": "genssl-assignments/1"}\n{"step": "0", "origins": "g", "indices": [1]}\n{"x": 1}\n',
            r"log:2 is no",
        ),
        (
            '{"format": "genssl-assignments/1"}\n{"step": 0, "origins": "g", "indices": ["1"]}\n{"x": 1}\n',
            r"log:2 is no",
        ),
        ("genssl-assignments/1 \N{LATIN SMALL LETTER E WITH ACUTE}\n", r"cannot be read \(it is not text\)"),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(tmp_path, text, said):
    (tmp_path / "log").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=said):
        Replay(view_plan(), tmp_path / "log", {}, 1)


def test_a_log_takes_eight_bytes_of_memory_a_step(tmp_path):
    steps, slots = 300, 1000
    with AssignmentLog(tmp_path / "log", HEADER) as log:
        for number in range(steps):
            log.write(number, ["generated"] * slots, range(number * slots, (number + 1) * slots))
    tracemalloc.start()
    try:
        replay = Replay(view_plan(), tmp_path / "log", HEADER, steps)
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 50_000
    assert most < 1_000_000, "the check reads a line at a time"
    assert replay.relabelled(299, Delivery(np.zeros(0, np.uint8), ["store"] * slots, []))[1][-1] == steps * slots - 1


def test_steps_are_found_in_any_order_and_later_ones_are_not_needed(path):
    header, *lines = path.read_text().splitlines(keepends=True)
    expected = {number: indices for number, _, indices in deliveries(view_plan())}
    path.write_text(header + "".join(reversed(lines)))
    replay = Replay(view_plan(), path, HEADER, 4)
    for number in (2, 0, 3, 1):
        planned = replay.step(*divmod(number, 3))
        rows = replay.slots(number)
        assert planned.indices[rows].max(axis=1).size == len(expected[number])
        slots = view_plan().step(*divmod(number, 3)).indices != REAL
        assert planned.indices[slots].tolist() == expected[number]


def test_a_log_that_changes_under_the_run_is_told(path):
    replay = Replay(view_plan(), path, HEADER, 6)
    replay.step(0, 0)
    path.write_text(path.read_text().replace('{"step":1,', '{"step":10,'))
    with pytest.raises(UserError, match="has changed since the run began, at step 1"):
        replay.step(0, 1)
    path.unlink()
    with pytest.raises(UserError, match="has changed since the run began, at step 0"):
        replay.step(0, 0)


def test_a_missing_log_is_told(tmp_path):
    with pytest.raises(UserError, match=r"variants.replay: .*nothing cannot be read \(No such file"):
        Replay(view_plan(), tmp_path / "nothing", HEADER, 1)
