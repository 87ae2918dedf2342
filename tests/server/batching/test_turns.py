"""Turns: who used least goes first, by holder and then by client."""

from __future__ import annotations

from genssl.server.batching.turns import REMEMBERED, Turns


def served(turns: Turns[str], cost: float = 1.0) -> list[str]:
    order = []
    while taken := turns.take():
        holder, client, thing = taken
        turns.charge(holder, client, cost)
        order.append(thing)
    return order


def test_clients_alternate_whatever_waits_and_each_keeps_its_order():
    turns = Turns[str]()
    for number in range(4):
        turns.add("lab", "a", f"a{number}")
    turns.add("lab", "b", "b0")
    assert served(turns) == ["a0", "b0", "a1", "a2", "a3"]


def test_holders_come_before_clients():
    turns = Turns[str]()
    for client in "abcd":
        turns.add("crowd", client, client)
    turns.add("one", "x", "x0")
    turns.add("one", "x", "x1")
    assert served(turns) == ["a", "x0", "b", "x1", "c", "d"]


def test_costs_and_not_counts_are_shared():
    turns, pixels = Turns[int](), {"large": 0, "small": 0}
    for _ in range(100):
        turns.add("large", "c", 10)
        turns.add("small", "c", 1)
    for _ in range(50):
        holder, client, cost = turns.take()
        turns.charge(holder, client, cost)
        pixels[holder] += cost
    assert abs(pixels["large"] - pixels["small"]) <= 10


def test_a_pause_neither_saves_turns_nor_costs_any():
    turns = Turns[str]()
    for number in range(60):
        turns.add("busy", "c", f"busy{number}")
    for _ in range(50):
        turns.charge(*turns.take()[:2], 1.0)  # type: ignore[call-arg]
    for number in range(5):
        turns.add("late", "c", f"late{number}")
    order = served(turns)
    assert order.index("late0") <= 1
    assert order.index("late4") >= 8, "it does not make up for turns that it did not want"


def test_one_who_may_not_go_lets_others_pass():
    turns = Turns[str]()
    turns.add("lab", "a", "a0")
    turns.add("lab", "b", "b0")
    assert turns.take(lambda thing: thing != "a0") == ("lab", "b", "b0")
    assert turns.take(lambda thing: thing != "a0") is None
    assert turns.take() == ("lab", "a", "a0")
    assert not turns


def test_names_that_have_gone_are_forgotten():
    turns = Turns[str]()
    for number in range(3 * REMEMBERED):
        turns.add(f"h{number}", f"c{number}", "thing")
        turns.charge(*turns.take()[:2], 1.0)  # type: ignore[call-arg]
    for number in range(3 * REMEMBERED):
        turns.add("one", f"c{number}", "thing")
        turns.charge(*turns.take()[:2], 1.0)  # type: ignore[call-arg]
    assert len(turns._holders) <= 2 * REMEMBERED
    assert len(turns._clients) <= 2 * REMEMBERED
    assert len(turns._clients["one"]) <= 2 * REMEMBERED
