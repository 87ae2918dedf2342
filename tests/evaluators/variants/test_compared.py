"""What is drawn and made for the judgements of variants, and all of them on a real generator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from variants_of_digits import Pixels, noisy

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.encoders.judge import GeneratedVariants
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import (
    FrechetConfig,
    PRDCConfig,
    SemanticConsistencyConfig,
    VariantMetricConfig,
    VendiConfig,
)
from genssl.evaluators.run import check, evaluate
from genssl.evaluators.variants import compared as reality
from genssl.evaluators.variants.compared import compared, draw, made

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "simclr_sd.yaml"


def config(**settings) -> VariantMetricConfig:
    return VariantMetricConfig(name="toy", **settings)


@pytest.fixture
def data(digits_train, digits_test) -> EvaluationData:
    return EvaluationData(digits_train, digits_test, "validation (0.2 of train)", noisy(10))


def test_draws_are_random_without_repetition_and_of_the_seed(data):
    rows = draw(config(), data, 100)
    assert rows == draw(config(), data, 100)
    assert rows != draw(config(seed=1), data, 100)
    assert len(set(rows)) == 100
    assert max(rows) < 360
    assert max(draw(config(split="train"), data, 1000)) >= 360
    assert sorted(draw(config(), data, 10_000)) == list(range(360))
    assert draw(config(), data, 20) == rows[:20], "fewer images are a part of more"


def test_variants_are_made_some_at_a_time(data, monkeypatch):
    monkeypatch.setattr(reality, "IMAGES", 7)
    rows = draw(config(), data, 20)
    parts = list(made(config(), data, rows, 2))
    assert [len(part) for part in parts] == [7, 7, 6]
    assert np.array_equal(np.concatenate(parts), noisy(10)(data.test, rows, 2))


def test_the_three_sets_are_of_equal_size_and_the_others_no_sources(data):
    encoder = FrozenEncoder(Pixels(), torch.device("cpu"))
    found = compared(encoder, config(images=50), data, 1)
    rows = draw(config(), data, 100)
    for features, images in (
        (found.sources, [data.test.image(row) for row in rows[:50]]),
        (found.others, [data.test.image(row) for row in rows[50:]]),
        (found.variants, noisy(10)(data.test, rows[:50], 1)),
    ):
        np.testing.assert_allclose(features, np.stack(images).reshape(50, -1) / 255, atol=1e-6)
    assert reality.facts(config(), data) == {"split": "validation (0.2 of train)", "seed": 0}
    assert reality.facts(config(split="train", seed=3), data) == {"split": "train", "seed": 3}


def test_all_of_them_judge_a_generator(digits_train, digits_test):
    """The built-in diffusion model keeps digits what they are, and makes other digits of them than copies."""
    recipe = load(Recipe, RECIPE)
    device = torch.device("cpu")
    data = EvaluationData(digits_train, digits_test, "test", GeneratedVariants(recipe, device))
    configs = [
        FrechetConfig(images=48),
        PRDCConfig(images=48),
        VendiConfig(images=24, variants=2),
        SemanticConsistencyConfig(images=24, variants=2),
    ]
    check(configs, data)
    found, protocols = evaluate(configs, Pixels(), data, device)
    assert all(np.isfinite(value) for value in found.values())
    assert set(protocols) == {"frechet", "prdc", "vendi", "semantic_consistency"}
    assert 0 < found["frechet/distance_of_real"] < 2 * found["frechet/distance"]
    assert found["prdc/precision"] > 0.5
    assert 1.05 < found["vendi/per_source"] < found["vendi/per_draw_of_real"]
    assert found["semantic_consistency/cosine_of_unrelated"] + 0.1 < found["semantic_consistency/cosine"] < 0.999
    assert found["semantic_consistency/label_agreement"] > 0.7
    again, _ = evaluate(configs, Pixels(), data, device)
    assert again == found
