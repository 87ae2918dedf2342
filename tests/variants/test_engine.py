"""The engine: complete parameters, padded batches, embeddings in a bounded cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssl.errors import RequestRefusedError
from genssl.generators.base import Cancelled
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


def test_a_batch_whose_rows_die_shrinks_and_leaves_the_living_as_they_were(engine, digits_test):
    rows = rows_of(engine, digits_test, 13)
    whole, _ = engine.generate(rows)
    asked = []

    def alive() -> list[bool]:
        asked.append(None)
        return [len(asked) < 2 or row in (2, 7, 12) for row in range(13)]

    images, _ = engine.generate(rows, alive=alive)
    assert len(asked) == 3, "before each of two steps, and before decoding"
    assert np.abs(images[[2, 7, 12]].astype(int) - whole[[2, 7, 12]]).max() <= 1
    assert not images[0].any(), "a dead row is not computed"
    assert images.shape == whole.shape


def test_a_batch_with_all_rows_alive_is_what_it_is_without_being_asked(engine, digits_test):
    rows = rows_of(engine, digits_test, 13)
    assert np.array_equal(engine.generate(rows, alive=lambda: [True] * 13)[0], engine.generate(rows)[0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_512_guidance_intervals_make_as_many_batches_as_one(unclip, digits_test, deterministic):
    engine = VariantEngine(unclip, [1, 4, 16, 64], deterministic=deterministic)
    (embedding,), _ = engine.embed([engine.generator.preprocess(digits_test.image(0))])
    guided = {"num_inference_steps": 4, "guidance_scale": 6.0}
    given = [guided | {"guidance_start": number / 512} for number in range(512)]
    rows = [engine.row(bytes(16), embedding, 0, engine.complete(one)) for one in given]
    batches = engine.batches(rows)
    assert [len(batch) for batch in batches] == [64] * 8
    chosen = [rows[position] for batch in batches for position in batch][5::64]  # intervals from 0.01 on to 0.89
    images, _ = engine.generate(chosen)
    for row, image in zip(chosen, images, strict=True):
        ((alone,), _) = engine.generate([row])
        assert np.abs(image.astype(int) - alone).max() <= (0 if deterministic else 1)


def test_a_batch_without_living_rows_is_given_up(engine, digits_test):
    with pytest.raises(Cancelled):
        engine.generate(rows_of(engine, digits_test, 2), alive=lambda: [False, False])


def test_deterministic_batches_never_shrink(unclip, digits_test):
    engine = VariantEngine(unclip, [1, 16], deterministic=True)
    rows = rows_of(engine, digits_test, 5)
    images, _ = engine.generate(rows, alive=lambda: [True, False, False, False, False])
    assert np.array_equal(images[0], engine.generate(rows)[0][0])


def test_a_larger_bucket_can_be_asked_for(engine, digits_test):
    rows = rows_of(engine, digits_test, 2)
    images, _ = engine.generate(rows, bucket=16)
    assert np.array_equal(images, engine.generate(rows_of(engine, digits_test, 13))[0][:2]), "equal bucket, equal bits"


def test_indices_make_different_variants_and_a_seed_replaces_the_derived_one(engine, digits_test):
    first, second = (rows_of(engine, digits_test, 1, index)[0] for index in (0, 1))
    images, _ = engine.generate([first, second])
    assert not np.array_equal(images[0], images[1])
    given = [Row(bytes(16), row.embedding, 9, row.settings) for row in (first, second)]
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
