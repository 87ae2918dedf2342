"""Variants whose parameters vary, and the drift guard: still functions of source, parameters and index."""

from __future__ import annotations

import numpy as np
import pytest

from genssl.generators.variation import adaptive_noise_level
from genssl.variants.engine import Row, VariantEngine

RANGES = {"guidance_scale": 0.5, "guidance_scale.max": 4, "noise_level.adaptive": 1}


@pytest.fixture(scope="module")
def engine(unclip) -> VariantEngine:
    return VariantEngine(unclip, [16], deterministic=True)


def rows_of(engine: VariantEngine, dataset, parameters, count: int = 12) -> list[Row]:
    embeddings, _ = engine.embed([engine.generator.preprocess(dataset.image(row)) for row in range(count)])
    settings = engine.complete(parameters)
    return [engine.row(dataset.source_id(row), embeddings[row], 0, settings) for row in range(count)]


def by_key(engine: VariantEngine, rows: list[Row]) -> dict[bytes, np.ndarray]:
    """Generates as a server does: rows that can share a batch together."""
    made = {}
    for key in {row.settings.batch_key for row in rows}:
        batch = [row for row in rows if row.settings.batch_key == key]
        made |= dict(zip([row.name for row in batch], engine.generate(batch)[0], strict=True))
    return made


def test_rows_draw_their_own_values_and_do_not_depend_on_their_batch(engine, digits_test):
    rows = rows_of(engine, digits_test, RANGES)
    guidances = {row.settings.parameters["guidance_scale"] for row in rows}
    assert len(guidances) == 12
    assert len({row.settings.batch_key for row in rows}) == 2, "with guidance, and without: two kinds of batches"
    for row in rows:
        assert row.settings.parameters["noise_level"] == adaptive_noise_level(float(row.embedding[-1]))
    together, reversed_ = by_key(engine, rows), by_key(engine, rows[::-1])
    for row in rows:
        assert np.array_equal(together[row.name], engine.generate([row])[0][0])
        assert np.array_equal(together[row.name], reversed_[row.name])


def test_a_settled_variant_is_the_one_of_the_plain_parameters_with_its_seed(engine, digits_test):
    row = rows_of(engine, digits_test, RANGES, 1)[0]
    plain = engine.complete({name: row.settings.parameters[name] for name in ("guidance_scale", "noise_level")})
    same = engine.row(digits_test.source_id(0), row.embedding, 0, plain, seed=row.seed)
    assert row.name != same.name, "another parameter mapping is another variant"
    assert np.array_equal(engine.generate([row])[0], engine.generate([same])[0])


def similarities(engine: VariantEngine, rows: list[Row], images) -> np.ndarray:
    return np.array(engine._similarities(rows, list(range(len(rows))), images))


def test_the_guard_draws_anew_what_is_too_unlike_its_source(engine, digits_test):
    loose = rows_of(engine, digits_test, {"noise_level": 900})
    free, _ = engine.generate(loose)
    before = similarities(engine, loose, free)
    threshold = float(np.median(before))
    guarded = {"noise_level": 900, "min_similarity": threshold, "max_tries": 3}
    embeddings = [row.embedding for row in loose]
    settings = engine.complete(guarded)
    # Equal seeds, so that the guard is all that differs.
    rows = [
        engine.row(digits_test.source_id(i), embeddings[i], 0, settings, seed=row.seed) for i, row in enumerate(loose)
    ]
    drawn = engine.redrawn
    images, _ = engine.generate(rows)
    after = similarities(engine, rows, images)
    failed = before < threshold
    assert 6 <= engine.redrawn - drawn <= 12
    assert np.array_equal(images[~failed], free[~failed]), "what passes stays as it was"
    assert (after[failed] >= before[failed]).all()
    assert (after[failed] >= threshold).sum() > 0
    alone = np.concatenate([engine.generate([row])[0] for row in rows])
    assert np.array_equal(images, alone)


def test_a_guard_that_nothing_passes_keeps_the_most_similar_draw_and_ends(engine, digits_test):
    rows = rows_of(engine, digits_test, {"noise_level": 900, "min_similarity": 1, "max_tries": 3}, 4)
    drawn = engine.redrawn
    images, _ = engine.generate(rows)
    assert engine.redrawn - drawn == 4 * 2
    once, _ = engine.generate(
        [engine.row(bytes(16), row.embedding, 0, engine.complete({"noise_level": 900}), seed=row.seed) for row in rows]
    )
    assert (similarities(engine, rows, images) >= similarities(engine, rows, once)).all()


def test_dead_rows_are_not_drawn_anew(engine, digits_test):
    rows = rows_of(engine, digits_test, {"min_similarity": 1, "max_tries": 3}, 4)
    drawn, asked = engine.redrawn, []

    def alive() -> list[bool]:
        asked.append(None)
        return [len(asked) <= 3, True, False, False]  # two steps and the decoder of the first draw

    engine.generate(rows, alive=alive)
    assert engine.redrawn - drawn == 2, "the second row alone, twice"
