"""The engine: complete parameters, padded batches, embeddings in a bounded cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssl.errors import RequestRefusedError
from genssl.variants.engine import EmbeddingCache, Row, VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest


@pytest.fixture(scope="module")
def engine(unclip) -> VariantEngine:
    return VariantEngine(unclip, [1, 4, 16])


def rows_of(engine: VariantEngine, dataset, count: int, index: int = 0) -> list[Row]:
    embeddings, _ = engine.embed([engine.generator.preprocess(dataset.image(row)) for row in range(count)])
    settings = engine.complete({})
    return [engine.row(dataset.source_id(row), embeddings[row], index, settings) for row in range(count)]


def test_a_variant_does_not_depend_on_its_batch(engine, digits_test):
    rows = rows_of(engine, digits_test, 13)
    together, _ = engine.generate(rows)
    alone = np.concatenate([engine.generate([row])[0] for row in rows])
    shuffled, _ = engine.generate(rows[::-1])
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert np.array_equal(together, shuffled[::-1]), "equal bucket, equal bits"


def test_indices_make_different_variants_and_a_seed_replaces_the_derived_one(engine, digits_test):
    first, second = (rows_of(engine, digits_test, 1, index)[0] for index in (0, 1))
    images, _ = engine.generate([first, second])
    assert not np.array_equal(images[0], images[1])
    given = [Row(bytes(16), row.embedding, 9, row.settings, derived=False) for row in (first, second)]
    same, _ = engine.generate(given)
    assert np.array_equal(same[0], same[1])


def test_parameters_are_completed_and_checked(engine):
    assert engine.complete({"noise_level": 7.0}).parameters["noise_level"] == 7
    assert engine.complete({}).parameters["num_inference_steps"] == 2
    with pytest.raises(RequestRefusedError, match="no parameter 'noise_levl'; did you mean 'noise_level'"):
        engine.complete({"noise_levl": 1})
    with pytest.raises(RequestRefusedError, match=r"whole number, not 1\.5"):
        engine.complete({"noise_level": 1.5})
    with pytest.raises(RequestRefusedError, match=r"outside 0\.\.999"):
        engine.complete({"noise_level": -1})


def test_the_cache_drops_what_was_used_longest_ago():
    cache = EmbeddingCache(2)
    for name in (b"a", b"b"):
        cache.put(name, torch.zeros(1))
    cache.get(b"a")
    cache.put(b"c", torch.zeros(1))
    assert cache.get(b"a") is not None
    assert cache.get(b"b") is None
    assert cache.get(b"c") is not None


def test_the_in_process_source_gives_the_engine_variants_and_counts_them(engine, digits_test):
    ledger = Ledger()
    source = InProcessSource(engine, digits_test, ledger, cached_embeddings=3)
    requests = [VariantRequest(row, digits_test.source_id(row), 0) for row in range(13)]
    delivery = source.take([*requests, requests[0]])
    expected, _ = engine.generate(rows_of(engine, digits_test, 13))
    assert np.abs(delivery.images[:13].astype(int) - expected).max() <= 1
    assert np.array_equal(delivery.images[13], delivery.images[0])
    assert set(delivery.origins) == {"generated"}
    assert ledger.calls == 1
    assert ledger.generator_seconds > 0
