"""The count of distinct variants, of any and of a plan's: exact, across restarts, and small."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from genssl.errors import UserError
from genssl.training.checkpoint import Position, RunCheckpoints, Trained, restore_ledger
from genssl.variants.ledger import Ledger
from genssl.variants.plan import ViewPlan
from genssl.variants.source import REAL
from genssl.variants.usage import VariantUsage


def test_it_agrees_with_a_set_and_a_counter(monkeypatch):
    monkeypatch.setattr("genssl.variants.usage.PENDING", 100)
    random = np.random.default_rng(0)
    usage, distinct, stood_in = VariantUsage(), set(), Counter()
    for number in range(20_000):
        source, index, stands_in = (
            bytes([random.integers(200)]) * 16,
            int(random.integers(50)),
            bool(random.integers(2)),
        )
        usage.add(source, index, stands_in)
        distinct.add((source, index))
        if stands_in:
            stood_in[source, index] += 1
        if number % 4999 == 0:
            assert usage.distinct == len(distinct)
            assert usage.stand_ins == len(stood_in)
            assert usage.most_stand_ins == max(stood_in.values(), default=0)
    assert usage.distinct == len(distinct) > 8000
    assert usage.stand_ins == len(stood_in) > 5000
    assert usage.most_stand_ins == max(stood_in.values()) > 3


def test_nothing_used_is_nothing_counted():
    usage = VariantUsage()
    assert (usage.distinct, usage.stand_ins, usage.most_stand_ins) == (0, 0, 0)


def test_a_variant_takes_at_most_sixteen_bytes_even_while_it_is_sorted_in():
    count, sources = 600_000, [bytes([number]) * 16 for number in range(250)]
    usage = VariantUsage()
    tracemalloc.start()
    try:
        for number in range(count):
            usage.add(sources[number % 250], number, False)
        assert usage.distinct == count
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / count < 13
    # What waits to be sorted in is of a fixed size until it is small against the rest.
    assert (most - 65_536 * 60) / count < 14


def test_it_goes_to_another_process():
    usage = VariantUsage()
    usage.add(bytes(16), 3, True)
    copied = pickle.loads(pickle.dumps(usage))
    copied.add(bytes(16), 3, True)
    assert (copied.distinct, copied.most_stand_ins, usage.most_stand_ins) == (1, 2, 1)


# ---- Of a plan ----

IMAGENET = 1_281_167


def saved(folder: Path, ledger: Ledger) -> int:
    """Writes a checkpoint of a model of one number; returns its bytes."""
    method = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(method.parameters())
    RunCheckpoints(folder, 1, {}).save(Position(step=1), Trained(method, optimizer, None), ledger, epoch=0)
    return (folder / "checkpoint.pt").stat().st_size


def loaded(folder: Path, plan: ViewPlan) -> Ledger:
    state, _ = RunCheckpoints(folder, 1, {}).latest()
    assert state is not None
    ledger = Ledger(usage=plan.usage())
    restore_ledger(state, ledger)
    return ledger


class BruteForce:
    """What the numbers must be."""

    def __init__(self) -> None:
        self.used: set[tuple[bytes, int]] = set()
        self.stood_in: Counter[tuple[bytes, int]] = Counter()

    def deliver(self, source: bytes, index: int, origin: str) -> None:
        if origin != "real":
            self.used.add((source, index))
        if origin == "reused":
            self.stood_in[source, index] += 1

    def agrees_with(self, ledger: Ledger, sources: list[bytes]) -> None:
        usage = copy.deepcopy(ledger.usage)
        usage.settle(sources.__getitem__)
        assert (usage.distinct, usage.stand_ins, usage.most_stand_ins) == (
            len(self.used),
            len(self.stood_in),
            max(self.stood_in.values(), default=0),
        )


@pytest.mark.parametrize("per_image", ["fresh", 3, 20])
@pytest.mark.parametrize(("policy", "probability"), [("second", 1.0), ("both", 0.6), ("third", 0.8)])
def test_it_agrees_with_a_set_and_a_counter_across_restarts(tmp_path, per_image, policy, probability):
    """With images that stand in the data set twice, and with stand-ins from what has come since the last restart."""
    random, images, epochs = Random(f"{per_image} {policy}"), 60, 9
    sources = [random.randbytes(16) for _ in range(images)]
    sources[7] = sources[30] = sources[3]
    sources[50] = sources[51]
    plan = ViewPlan(
        seed=5, num_sources=images, batch_size=8, policy=policy, probability=probability, per_image=per_image,
        third_count=2,
    )  # fmt: skip
    ledger, truth = Ledger(usage=plan.usage()), BruteForce()
    pool: dict[bytes, list[int]] = {}
    steps = epochs * plan.steps_per_epoch
    for step in range(steps):
        for ahead in range(step, min(step + 4, steps)):
            coming = plan.step(*divmod(ahead, plan.steps_per_epoch))
            for row, column in zip(*(coming.indices != REAL).nonzero(), strict=True):
                if random.random() < 0.3:
                    pool.setdefault(sources[coming.rows[row]], []).append(int(coming.indices[row, column]))
        planned = plan.step(*divmod(step, plan.steps_per_epoch))
        for place, column in zip(*(planned.indices != REAL).nonzero(), strict=True):
            row, index = int(planned.rows[place]), int(planned.indices[place, column])
            origin: Any = random.choice(["generated", "store", "reused", "reused", "real"])
            if origin == "reused":
                index = random.choice(pool.get(sources[row]) or [REAL])
                origin = "real" if index == REAL else origin
            ledger.deliver(sources[row], index, origin, row)
            truth.deliver(sources[row], index, origin)
        truth.agrees_with(ledger, sources)
        if random.random() < 0.3 and step < 4 * plan.steps_per_epoch:
            saved(tmp_path, ledger)
            ledger = loaded(tmp_path, plan)
            truth.agrees_with(ledger, sources)
            pool.clear()
    if per_image == "fresh":
        assert len(ledger.usage.state()["indices"]) <= 8, (  # type: ignore[call-overload]
            "what has passed is forgotten, though equal rows had to be found"
        )
    assert len(truth.stood_in) > 20
    assert max(truth.stood_in.values()) > 1


def test_a_replay_keeps_what_stood_in_in_any_epoch(tmp_path):
    plan = ViewPlan(seed=0, num_sources=4, batch_size=4, policy="second", probability=1.0, per_image="fresh")
    ledger, truth, sources = Ledger(usage=plan.usage()), BruteForce(), [bytes(range(16))] * 4
    ledger.usage.forgets = False
    for origin, index in [("generated", 1), ("reused", 1), ("generated", 3), ("reused", 1), ("generated", 9)]:
        ledger.deliver(sources[2], index, origin, 2)
        truth.deliver(sources[2], index, origin)
        saved(tmp_path, ledger)
        ledger = loaded(tmp_path, plan)
        ledger.usage.forgets = False
        truth.agrees_with(ledger, sources)


def deliver_epochs(ledger: Ledger, plan: ViewPlan, rows: int, epochs: int, late: float = 0.0) -> None:
    """Delivers whole epochs at once, of which `late` got another variant of the image: that of the epoch before."""
    sources = np.random.default_rng(0).integers(1, 2**63, rows, dtype=np.uint64)
    usage = ledger.usage
    for epoch in range(epochs):
        numbers = plan._of_epoch(epoch)[1][:, 1] - usage._first
        is_late = np.random.default_rng(epoch).random(rows) < late if epoch else np.zeros(rows, bool)
        for number in np.unique(numbers):
            used = (numbers == number) & ~is_late
            known = usage._used.setdefault(int(number), np.zeros(-(-rows // 8), np.uint8))
            known |= np.packbits(used)
        usage._newest = int(numbers.max())
        before = plan._of_epoch(epoch - 1)[1][:, 1] if epoch else numbers
        for row in np.flatnonzero(is_late).tolist():
            usage.add(int(sources[row]).to_bytes(8) * 2, int(before[row]), True, row)  # type: ignore[call-arg]
    usage._sources[:], usage._seen[:] = sources, True


@pytest.mark.parametrize(("images", "epochs"), [(40_000, 100), pytest.param(IMAGENET, 100, marks=pytest.mark.slow)])
def test_a_checkpoint_of_a_fresh_plan_does_not_grow_with_its_variants(tmp_path, images, epochs):
    plan = ViewPlan(seed=3, num_sources=images, batch_size=100, policy="second", probability=1.0, per_image="fresh")
    ledger = Ledger(usage=plan.usage())
    deliver_epochs(ledger, plan, images, epochs)
    assert ledger.usage.distinct == images * epochs
    empty = saved(tmp_path, Ledger(usage=plan.usage()))
    assert saved(tmp_path, ledger) - empty < 1000 + images // 100
    again = loaded(tmp_path, plan)
    assert again.usage.distinct == images * epochs
    again.deliver(bytes(16), 3 * 2**32 + epochs * 2 + 1, "generated", 0)
    assert again.usage.distinct == images * epochs + 1


@pytest.mark.parametrize("images", [40_000, pytest.param(IMAGENET, marks=pytest.mark.slow)])
@pytest.mark.parametrize("late", [0.0, 0.003])
def test_a_checkpoint_of_k_variants_an_image_takes_a_bit_each(tmp_path, images, late):
    plan = ViewPlan(seed=3, num_sources=images, batch_size=100, policy="second", probability=1.0, per_image=10)
    ledger = Ledger(usage=plan.usage())
    deliver_epochs(ledger, plan, images, 8, late)
    empty = saved(tmp_path, Ledger(usage=plan.usage()))
    assert images * 5 < ledger.usage.distinct < images * 6
    assert saved(tmp_path, ledger) - empty <= images * 10 // 8 + images * 10 // 80 + 1000
    again = loaded(tmp_path, plan)
    assert again.usage.distinct == ledger.usage.distinct
    assert (again.usage.stand_ins, again.usage.most_stand_ins) == (ledger.usage.stand_ins, ledger.usage.most_stand_ins)


def test_while_running_a_variant_takes_little_more_than_a_bit():
    images, epochs = 5000, 16
    plan = ViewPlan(seed=0, num_sources=images, batch_size=100, policy="second", probability=1.0, per_image="fresh")
    sources = [number.to_bytes(16) for number in range(images)]
    ledger = Ledger(usage=plan.usage())
    tracemalloc.start()
    try:
        for epoch in range(epochs):
            for row in range(images):
                ledger.deliver(sources[row], 2 * epoch + 1, "generated", row)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ledger.usage.distinct == images * epochs
    assert held < images * epochs // 8 + 60_000


def test_the_usage_of_an_older_checkpoint_goes_on(tmp_path):
    """It has a hash of each variant's name, which tells nothing of the row."""
    plan = ViewPlan(seed=0, num_sources=4, batch_size=4, policy="second", probability=1.0, per_image=5)
    older = Ledger()
    for index, origin in [(1, "generated"), (1, "reused"), (2, "reused"), (2, "reused")]:
        older.deliver(bytes(16), index, origin)
    saved(tmp_path, older)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert isinstance(state["usage"], list)
    torch.save(state | {"format": "genssl-checkpoint/1"}, tmp_path / "checkpoint.pt")
    ledger = loaded(tmp_path, plan)
    assert isinstance(ledger.usage, VariantUsage)
    for index, origin in [(2, "generated"), (2, "reused"), (4, "generated")]:
        ledger.deliver(bytes(16), index, origin, 0)
    assert (ledger.usage.distinct, ledger.usage.stand_ins, ledger.usage.most_stand_ins) == (3, 2, 3)
    saved(tmp_path, ledger)
    assert loaded(tmp_path, plan).usage.distinct == 3


@pytest.mark.parametrize(("per_image", "index"), [(5, 5), (5, -1), ("fresh", 0), ("fresh", 3 * 2**32)])
def test_an_index_that_the_plan_has_not_is_refused(per_image, index):
    plan = ViewPlan(seed=2, num_sources=4, batch_size=4, policy="second", probability=1.0, per_image=per_image)
    with pytest.raises(UserError, match="is not in this run's plan; its assignment log is damaged"):
        Ledger(usage=plan.usage()).deliver(bytes(16), index, "reused", 0)
