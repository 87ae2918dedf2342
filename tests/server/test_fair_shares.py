"""Shares of the device: per token first, per client second, whatever clients call themselves and claim to be."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from genssl.config.server import TokenConfig
from genssl.server.auth import holder_of, read_tokens
from genssl.server.batching.schedule import Priority, Schedule, Submitter, Waiting

KEY = "key"


@dataclass
class Flood:
    """One holder's clients, each of which has always `waiting` rows in the queue."""

    holder: str
    clients: list[str]
    priority: Priority = Priority.TRAINING
    key: Any = KEY
    waiting: int = 64
    held: Counter[str] = field(default_factory=Counter)

    def fill(self, schedule: Schedule[Waiting], now: float) -> None:
        for client in self.clients:
            while self.held[client] < self.waiting:
                schedule.add(Waiting(self.key, Submitter(client, self.priority, self.holder)), now)
                self.held[client] += 1


def shares(*floods: Flood, batches: int = 400, row_seconds: dict[Any, float] | None = None) -> dict[str, float]:
    """Returns each holder's part of the device's time in a simulation of batches of 16."""
    schedule: Schedule[Waiting] = Schedule(10)
    now, seconds = 0.0, Counter[str]()
    for _ in range(batches):
        for flood in floods:
            flood.fill(schedule, now)
        batch = schedule.take(schedule.next_key(now), 16)
        took = (row_seconds or {}).get(batch[0].key, 0.1)
        for job in batch:
            next(flood for flood in floods if flood.holder == job.submitter.holder).held[job.submitter.client] -= 1
            seconds[job.submitter.holder] += took
        now += took * len(batch)
        schedule.charge(batch, took)
    return {holder: part / seconds.total() for holder, part in seconds.items()}


@pytest.mark.parametrize("row_seconds", [0.001, 0.02, 0.5])
def test_rows_that_have_waited_long_do_not_come_before_all_that_others_ask_for(row_seconds):
    """The flood's rows wait for up to half an hour, and rise after ten seconds."""
    flood, trickle = Flood("A", ["a"], waiting=4000), Flood("B", ["b"], waiting=32)
    assert shares(flood, trickle, row_seconds={KEY: row_seconds})["B"] == pytest.approx(0.5, abs=0.1)
    flood, trickle = Flood("A", ["a"], waiting=4000, key="x"), Flood("B", ["b"], waiting=32, key="y")
    both = {"x": row_seconds, "y": row_seconds}
    assert shares(flood, trickle, row_seconds=both)["B"] == pytest.approx(0.5, abs=0.1)


def names(count: int) -> list[str]:
    return [f"a{number}" for number in range(count)]


def test_a_token_of_16_names_gets_half_beside_one_of_one():
    assert shares(Flood("A", names(16)), Flood("B", ["b"]))["B"] == pytest.approx(0.5, abs=0.02)


def test_three_tokens_of_any_numbers_of_names_get_a_third_each():
    found = shares(Flood("A", names(16)), Flood("B", ["b"]), Flood("C", ["c", "d", "e"]))
    assert all(share == pytest.approx(1 / 3, abs=0.02) for share in found.values())


def test_the_clients_of_a_token_share_its_part_equally():
    schedule: Schedule[Waiting] = Schedule(10)
    for client, rows in (("flood", 1000), ("trickle", 40)):
        for _ in range(rows):
            schedule.add(Waiting(KEY, Submitter(client, holder="A")), 0.0)
    for _ in range(200):
        schedule.add(Waiting(KEY, Submitter("b", holder="B")), 0.0)
    taken = Counter(job.submitter.client for _ in range(10) for job in schedule.take(schedule.next_key(0.0), 16))
    assert taken == {"b": 80, "flood": 40, "trickle": 40}


def test_a_token_whose_rows_cost_more_gets_no_more_of_the_device():
    dear = Flood("A", names(4), key="1000 steps", waiting=16)
    found = shares(dear, Flood("B", ["b"], key="10 steps"), row_seconds={"1000 steps": 1.0, "10 steps": 0.01})
    assert found["B"] == pytest.approx(0.5, abs=0.05), "which takes 100 of its batches to one of the other's"


def test_a_token_whose_rows_share_no_batches_gets_no_less():
    schedule: Schedule[Waiting] = Schedule(10)
    for number in range(400):
        schedule.add(Waiting(f"own {number}", Submitter("a", holder="A")), 0.0)
        schedule.add(Waiting(KEY, Submitter("b", holder="B")), 0.0)
    seconds = Counter[str]()
    for _ in range(48):
        batch = schedule.take(schedule.next_key(0.0), 16)
        schedule.charge(batch, 1 / len(batch))  # a batch takes a second, whatever its size
        seconds[batch[0].submitter.holder] += 1
    assert abs(seconds["A"] - seconds["B"]) <= 2


def test_one_who_comes_late_is_owed_nothing_for_the_time_before():
    schedule: Schedule[Waiting] = Schedule(10**6)
    early, late = Flood("A", ["a"], key="x"), Flood("B", ["b"], key="y")
    order = []
    for number in range(40):
        early.fill(schedule, 0.0)
        if number >= 20:
            late.fill(schedule, 0.0)
        batch = schedule.take(schedule.next_key(0.0), 16)
        for job in batch:
            (early if job.submitter.holder == "A" else late).held[job.submitter.client] -= 1
        schedule.charge(batch, 1.0)
        order.append(batch[0].submitter.holder)
    assert order[:20] == ["A"] * 20
    assert order[20:].count("B") in (10, 11)


def test_the_books_of_holders_who_have_gone_do_not_pile_up():
    schedule: Schedule[Waiting] = Schedule(10)
    for number in range(5000):
        schedule.add(Waiting(KEY, Submitter("c", holder="stays")), 0.0)
        schedule.add(Waiting(KEY, Submitter("c", holder=f"host {number}")), 0.0)
        schedule.charge(schedule.take(schedule.next_key(0.0), 2), 1.0)
    assert len(schedule._device_seconds) < 1100


@pytest.mark.parametrize(
    ("highest", "claimed", "expected"),
    [
        ("training", Priority.INTERACTIVE, Priority.TRAINING),
        ("interactive", Priority.INTERACTIVE, Priority.INTERACTIVE),
        ("bulk", Priority.INTERACTIVE, Priority.BULK),
        ("interactive", Priority.BULK, Priority.BULK),
    ],
)
def test_a_claim_is_lowered_to_the_highest_class_of_its_token(monkeypatch, highest, claimed, expected):
    monkeypatch.setenv("A_TOKEN", "a" * 32)
    (token,) = read_tokens([TokenConfig(name="a", env="A_TOKEN", highest_priority=highest)], 64)
    assert token.lowered(claimed) is expected


def test_a_token_that_is_granted_nothing_else_is_no_higher_than_training(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "a" * 32)
    (token,) = read_tokens([TokenConfig(name="a", env="A_TOKEN")], 64)
    assert token.lowered(Priority.INTERACTIVE) is Priority.TRAINING
    claimed = [Flood("A", names(4), priority=token.lowered(Priority.INTERACTIVE)), Flood("B", ["b"])]
    assert shares(*claimed)["B"] == pytest.approx(0.5, abs=0.02)


def test_without_tokens_a_machine_is_the_holder():
    peers = ["ipv4:10.0.0.7:40000", "ipv4:10.0.0.7:40001", "ipv4:10.0.0.8:40000", "unix:", "unix:/run/genssl.sock"]
    first, second, other, *local = [holder_of(None, peer) for peer in peers]
    assert first == second != other
    assert len({*local}) == 1
    near = [holder_of(None, f"ipv6:%5B2001:db8:0:1::{end}%5D:{end}") for end in (1, 2)]
    assert near[0] == near[1] != holder_of(None, "ipv6:%5B2001:db8:0:2::1%5D:9")
    assert holder_of(None, "ipv6:%5Bfe80::1%25eth0%5D:9") == holder_of(None, "ipv6:%5Bfe80::2%25eth0%5D:9")
    assert holder_of(None, "ipv4:127.0.0.1:1") != holder_of(None, "ipv6:%5B::1%5D:1")


def test_what_goes_before_follows_the_shares_and_costs_the_same_however_many_names_there_are():
    generator = random.Random(0)
    for _ in range(50):
        schedule: Schedule[Waiting] = Schedule(10)
        held: dict[str, Counter[str]] = {holder: Counter() for holder in "ABC"}
        for _ in range(generator.randrange(300)):
            holder, client = generator.choice("ABC"), str(generator.randrange(4))
            schedule.add(Waiting(KEY, Submitter(client, holder=holder)), 0.0)
            held[holder][client] += 1
        new = generator.randrange(1, 60)
        mine = held["A"]["0"] + new
        turns = new + held["A"]["0"] + sum(min(rows, mine) for client, rows in held["A"].items() if client != "0")
        before = turns - new + sum(min(held[other].total(), turns) for other in "BC")
        total = sum(one.total() for one in held.values())
        found = schedule.part_before(new, Submitter("0", holder="A")) * total
        assert before - 1e-6 <= found <= min(total, 2 * before) + 1e-6, "at most what mixed lengths of queues hide"


def test_sources_are_embedded_by_turns_of_tokens_too():
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch

    from genssl.generators.base import GeneratorSpec
    from genssl.server.batching.embedder import Embedder
    from genssl.server.statistics import Statistics
    from genssl.variants.engine import VariantEngine

    batches: list[list[int]] = []

    class Eye:
        spec = GeneratorSpec("eye", "none", bytes(16), 1, 1, "none", {}, {})

        def embed(self, images: torch.Tensor) -> torch.Tensor:
            batches.append([int(image[0, 0, 0]) for image in images])
            return torch.zeros(len(images), 1)

    async def test() -> None:
        with ThreadPoolExecutor(1) as device:
            embedder = Embedder(
                VariantEngine(Eye(), [16]), device, 1000, Statistics("cpu", [16], queued_bytes=int).register("eye")
            )

            def ask(first: int, count: int, **whose: str) -> Any:
                greys = range(first, first + count)
                images = {bytes([grey]): np.full((3, 1, 1), grey, dtype=np.uint8) for grey in greys}
                return embedder.embed(images, Submitter(**whose))

            calls = [ask(8 * number, 8, holder="A", client=f"a{number}") for number in range(16)]
            await asyncio.gather(*calls, ask(200, 24, holder="B", client="b"))

    asyncio.run(test())
    assert [sum(grey >= 200 for grey in batch) for batch in batches[:4]] == [8, 8, 8, 0]
