"""The ledger counts what was delivered."""

from __future__ import annotations

from genssl.variants.ledger import Ledger


def test_fresh_fraction_and_counts():
    ledger = Ledger()
    for index, origin in enumerate(["generated", "generated", "store", "reused", "real"]):
        ledger.deliver(bytes(16), min(index, 2), origin)
    summary = ledger.summary()
    assert (summary["variants_generated"], summary["variants_from_store"]) == (2, 1)
    assert (summary["variants_reused"], summary["fallbacks_to_real"]) == (1, 1)
    assert summary["fresh_fraction"] == 0.6
    assert summary["distinct_variants"] == 3, "a real image is no variant, and a reused one is not new"


def test_an_empty_ledger_claims_nothing_fresh():
    assert Ledger().summary()["fresh_fraction"] == 0.0


def test_stand_ins_are_counted_by_variant():
    ledger = Ledger()
    for index in (1, 1, 1, 2):
        ledger.deliver(bytes(16), index, "reused")
    ledger.deliver(bytes(16), 1, "generated")
    ledger.deliver(bytes(16), -1, "real")
    summary = ledger.summary()
    assert (summary["reuse_mean"], summary["reuse_max"]) == (2.0, 3)
    assert summary["distinct_variants"] == 2
    assert ledger.wanted == 6


def test_latencies_and_retries_stand_in_the_summary():
    ledger = Ledger()
    ledger.fetch_seconds.extend(number / 100 for number in range(1, 101))
    ledger.retries_by_kind.update(full=3, away=1)
    summary = ledger.summary()
    assert summary["fetch_seconds_p50"] == 0.505
    assert summary["fetch_seconds_p95"] == 0.9505
    assert (summary["retries_full"], summary["retries_away"]) == (3, 1)
