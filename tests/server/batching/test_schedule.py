"""The order of the waiting rows."""

from __future__ import annotations

from collections import Counter

from genssl.server.batching.schedule import Priority, Schedule, Submitter, Waiting

KEY = "key"


def fill(
    schedule: Schedule, client: str, rows: int, priority: Priority = Priority.TRAINING, key: str = KEY, now: float = 0.0
) -> list[Waiting]:
    jobs = [Waiting(key, Submitter(client, priority)) for _ in range(rows)]
    for job in jobs:
        schedule.add(job, now)
    return jobs


def next_batch(schedule: Schedule, most: int, now: float = 0.0) -> list[Waiting]:
    return schedule.take(schedule.next_key(now), most)


def test_classes_go_in_order_and_lower_ones_fill_up():
    schedule = Schedule(10)
    bulk, training = fill(schedule, "a", 5, Priority.BULK), fill(schedule, "b", 3)
    interactive = fill(schedule, "c", 1, Priority.INTERACTIVE)
    assert schedule.by_priority() == {"interactive": 1, "training": 3, "bulk": 5}
    assert next_batch(schedule, 6) == interactive + training + bulk[:2]
    assert len(schedule) == 3
    assert next_batch(schedule, 6) == bulk[2:]
    assert schedule.next_key(0.0) is None


def test_a_clients_rows_keep_their_order_and_clients_take_turns():
    schedule = Schedule(10)
    flood = fill(schedule, "flood", 1000)
    trickle = fill(schedule, "trickle", 3)
    batch = next_batch(schedule, 8)
    assert [job for job in batch if job.submitter.client == "flood"] == flood[:5]
    assert [job for job in batch if job.submitter.client == "trickle"] == trickle


def test_three_clients_get_equal_shares_over_many_small_batches():
    schedule = Schedule(10)
    for client in ("a", "b", "c"):
        fill(schedule, client, 100)
    shares = Counter(job.submitter.client for _ in range(30) for job in next_batch(schedule, 4))
    assert max(shares.values()) - min(shares.values()) <= 1


def test_a_batch_has_one_key_and_clients_of_rare_keys_get_their_turn():
    schedule = Schedule(10)
    fill(schedule, "flood", 1000, key="common")
    fill(schedule, "rare", 2, key="rare")
    batches = [next_batch(schedule, 16) for _ in range(2)]
    assert [{job.key for job in batch} for batch in batches] == [{"common"}, {"rare"}]
    assert schedule.backlog.waiting("common") == 984
    assert schedule.backlog.waiting("rare") == 0


def test_the_key_is_that_of_the_clients_oldest_row():
    schedule = Schedule(10)
    first, second = fill(schedule, "a", 1, key="x"), fill(schedule, "a", 1, key="y")
    assert next_batch(schedule, 1) == first
    assert next_batch(schedule, 1) == second


def test_rows_rise_one_class_after_each_interval():
    schedule = Schedule(10)
    (old,) = fill(schedule, "a", 1, Priority.BULK)
    fill(schedule, "b", 50, now=9.0)
    schedule.next_key(9.9)
    assert old.lane is Priority.BULK
    schedule.next_key(10.0)
    assert old.lane is Priority.TRAINING
    assert old in next_batch(schedule, 3, now=10.0)

    (old,) = fill(schedule, "a", 1, Priority.BULK, now=20.0)
    for now in (30.0, 40.0):
        fill(schedule, "c", 100, Priority.INTERACTIVE, now=now)
        schedule.next_key(now)
    assert old.lane is Priority.INTERACTIVE
    assert schedule.by_priority()["bulk"] == 1, "counted by the class it asked for"
    assert old in next_batch(schedule, 4, now=40.0)


def test_a_discarded_row_is_gone_from_every_count():
    schedule = Schedule(10)
    jobs = fill(schedule, "a", 3)
    schedule.discard(jobs[1])
    assert (len(schedule), schedule.by_priority()["training"], schedule.backlog.waiting(KEY)) == (2, 2, 2)
    assert next_batch(schedule, 9) == [jobs[0], jobs[2]]
    assert (len(schedule), schedule.by_priority()["training"], schedule.backlog.waiting(KEY)) == (0, 0, 0)


def test_what_goes_ahead_depends_on_class_and_client():
    schedule = Schedule(10)
    fill(schedule, "bulk", 100, Priority.BULK)
    fill(schedule, "flood", 50)
    fill(schedule, "now", 2, Priority.INTERACTIVE)

    def ahead(priority: Priority, client: str) -> float:
        part = schedule.part_before(4, Submitter(client, priority))
        return schedule.backlog.seconds({KEY: 4}, priority, part, lambda key, rows: rows) - 4

    assert ahead(Priority.INTERACTIVE, "now") == 2
    assert ahead(Priority.TRAINING, "new") == 6, "four turns of the flood, and the interactive ones"
    assert ahead(Priority.TRAINING, "flood") == 52
    assert ahead(Priority.BULK, "bulk") == 152


class Name(str):
    """A client's name that counts how often it is looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        Name.looked_up += 1
        return super().__hash__()


def test_a_row_costs_the_same_however_many_wait():
    def lookups_per_row(rows: int) -> float:
        schedule = Schedule(10)
        Name.looked_up = 0
        jobs = [job for client in range(rows // 32) for job in fill(schedule, Name(client), 32)]
        for job in jobs[::2]:
            schedule.discard(job)
        while next_batch(schedule, 64):
            pass
        return Name.looked_up / rows

    assert lookups_per_row(16384) < 1.1 * lookups_per_row(512)
