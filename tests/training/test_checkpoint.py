"""Checkpoint files: which stay, and what happens when one is damaged."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

from genssl.encoders.foreign import read_checkpoint
from genssl.errors import UserError
from genssl.generator_training.loop import Checkpoints as StageCheckpoints
from genssl.training.checkpoint import Position, RunCheckpoints, Trained, restore, restore_ledger
from genssl.variants.ledger import Ledger
from genssl.variants.replay import AssignmentLog

IDENTITY = {"recipe": "a1", "dataset": "b2"}


class Training:
    """A model of two numbers that has been trained for some steps."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.method = nn.Linear(2, 1)
        self.optimizer = torch.optim.AdamW(self.method.parameters(), lr=0.1)
        self.ledger = Ledger()
        self.position = Position()
        self.checkpoints = RunCheckpoints(folder, keep, dict(IDENTITY))

    def train_to(self, step: int, *, is_best: bool = False, due: bool = True) -> None:
        while self.position.step < step:
            self.optimizer.zero_grad()
            self.method(torch.ones(1, 2)).sum().backward()
            self.optimizer.step()
            self.position.step += 1
            self.ledger.deliver(bytes([step]) * 16, step, "generated" if step % 2 else "reused")
        trained = Trained(self.method, self.optimizer, None)
        self.checkpoints.save(self.position, trained, self.ledger, epoch=0, is_best=is_best, due=due)

    def load(self) -> tuple[int, list[str]]:
        state, notes = self.checkpoints.latest()
        assert state is not None
        self.position = restore(state, Path("checkpoint.pt"), Trained(self.method, self.optimizer, None))
        restore_ledger(state, self.ledger)
        return self.position.step, notes


def damage(path: Path) -> None:
    """Flips one bit of a weight or a moment: torch.load by itself does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


def test_everything_comes_back(tmp_path):
    one = Training(tmp_path)
    one.train_to(5)
    one.ledger.stall_seconds, one.ledger.calls = 1.5, 7
    one.ledger.retries_by_kind["full"] += 2
    one.ledger.fetch_seconds.append(0.25)
    one.train_to(5)
    other = Training(tmp_path)
    assert other.load() == (5, [])
    assert torch.equal(one.method.weight, other.method.weight)
    assert one.ledger.summary() == other.ledger.summary()
    for training in (one, other):
        training.train_to(9)
    assert torch.equal(one.method.weight, other.method.weight)
    assert one.ledger.summary() == other.ledger.summary(), "a variant that was used before is not counted as a new one"


def test_the_latest_and_the_best_stay(tmp_path):
    training = Training(tmp_path, keep=3)
    for step in range(1, 7):
        training.train_to(step, is_best=step == 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt",
        "checkpoint-5.pt",
        "checkpoint-4.pt",
        "checkpoint-best.pt",
    }
    steps = {path.name: torch.load(path, weights_only=True)["step"] for path in tmp_path.iterdir()}
    assert steps == {"checkpoint.pt": 6, "checkpoint-5.pt": 5, "checkpoint-4.pt": 4, "checkpoint-best.pt": 2}


def test_a_best_step_that_no_checkpoint_is_due_at_is_kept_alone(tmp_path):
    Training(tmp_path).train_to(1, is_best=True, due=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-best.pt"]


def test_a_resumed_run_moves_the_old_one_away_too(tmp_path):
    Training(tmp_path, keep=2).train_to(3)
    training = Training(tmp_path, keep=2)
    training.load()
    training.train_to(4)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "checkpoint-3.pt"}


@pytest.mark.parametrize("how", [damage, lambda path: path.write_bytes(path.read_bytes()[:500]), Path.touch])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, how):
    training = Training(tmp_path, keep=2)
    for step in (1, 2):
        training.train_to(step)
    if how is Path.touch:
        (tmp_path / "checkpoint.pt").write_bytes(b"")
    else:
        how(tmp_path / "checkpoint.pt")
    step, notes = Training(tmp_path, keep=2).load()
    assert step == 1
    assert notes[0].startswith(f"{tmp_path}/checkpoint.pt is damaged (")
    assert notes[1] == "going back to checkpoint-1.pt, after step 1"


def test_a_checkpoint_with_any_bit_flipped_is_refused(tmp_path):
    """Also where no checksum of the archive looks: in the names, places and padding of its parts."""
    Training(tmp_path).train_to(3)
    path, random = tmp_path / "checkpoint.pt", Random(0)
    content = path.read_bytes()
    training, unnoticed = Training(tmp_path), []
    for position in random.sample(range(len(content)), 400):
        changed = bytearray(content)
        changed[position] ^= 1 << random.randrange(8)
        path.write_bytes(bytes(changed))
        with suppress(UserError):
            training.load()
            unnoticed.append(position)
    assert unnoticed == []
    path.write_bytes(content)
    assert Training(tmp_path).load() == (3, [])


def test_checkpoints_without_a_digest_are_read(tmp_path):
    one = Training(tmp_path)
    one.train_to(2)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state, tmp_path / "checkpoint.pt")
    other = Training(tmp_path)
    assert other.load() == (2, [])
    assert torch.equal(one.method.weight, other.method.weight)
    damage(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="is damaged"):
        Training(tmp_path).load()


def test_an_encoder_is_not_taken_from_a_damaged_checkpoint(tmp_path):
    Training(tmp_path).train_to(1)
    damage(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint.pt: is damaged \("):
        read_checkpoint(tmp_path / "checkpoint.pt")


def test_the_checkpoint_of_a_generators_stage_is_checked(tmp_path):
    stages = StageCheckpoints(tmp_path)
    stages.save("flow", {"weights": torch.arange(2000.0), "step": 3})
    assert stages.load("flow")["step"] == 3
    damage(tmp_path / ".flow.checkpoint.pt")
    with pytest.raises(UserError, match=r"\.flow\.checkpoint\.pt is damaged .*; remove it to begin the stage 'flow'"):
        stages.load("flow")


def test_nothing_left_to_fall_back_to_is_one_sentence(tmp_path):
    Training(tmp_path).train_to(1)
    damage(tmp_path / "checkpoint.pt")
    with pytest.raises(
        UserError, match=r"checkpoint.pt is damaged \(the checksum of \S+ is wrong\), and there is no ot"
    ):
        Training(tmp_path).load()


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "owned").touch, ())

    torch.save({"format": "genssl-checkpoint/1", "x": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="is damaged"):
        Training(tmp_path).load()
    assert not (tmp_path / "owned").exists()


def test_the_checkpoint_of_another_generator_or_model_is_refused(tmp_path):
    training = Training(tmp_path)
    training.checkpoints.identify(None, generator="c3")
    training.train_to(1)
    other = Training(tmp_path)
    state, _ = other.checkpoints.latest()
    with pytest.raises(UserError, match=r"another run: generator c3 \(now: d4\)\. A run goes on only with"):
        other.checkpoints.identify(state, generator="d4")
    with pytest.raises(UserError, match="holds the weights of another model"):
        restore(state, tmp_path, Trained(nn.Linear(3, 1), other.optimizer, None))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    training = Training(tmp_path)
    training.train_to(1)

    def fail(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        UserError, match=r"checkpoint.pt cannot be written \(\[Errno 28\] No space left on device\); the"
    ):
        training.train_to(2)
    monkeypatch.undo()
    assert Training(tmp_path).load()[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_assignment_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "assignments.jsonl"
    with AssignmentLog(path, {"seed": 3}) as log:
        for step in range(4):
            log.write(step, ["generated"], [step])
    whole = path.read_text()
    path.write_text(whole + '{"step":4,"ori')
    with AssignmentLog(path, {"seed": 3}, done=2) as log:
        log.write(2, ["generated"], [2])
        log.flush()
        assert path.read_text() == "".join(whole.splitlines(keepends=True)[:4])
    with pytest.raises(UserError, match="does not have the 9 steps that this run has done"):
        AssignmentLog(path, {"seed": 3}, done=9)
