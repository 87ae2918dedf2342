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
