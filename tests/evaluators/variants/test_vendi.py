"""The Vendi score against its definition, on sets whose number of different images is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from variants_of_digits import Pixels, noisy

from genssl.data.load import Subset
from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import VendiConfig
from genssl.evaluators.variants.vendi import Vendi, vendi_score

SHAPES = [(5, 3), (40, 7), (30, 60), (2, 300)]


def kernel_eigenvalues(x):
    """Of K / n, K the cosines of all pairs, formed as they are."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.linalg.eigvalsh(unit @ unit.T / len(x)).clip(min=0)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_it_equals_its_definition(n, d):
    x = np.random.default_rng((n, d)).standard_normal((n, d)) + 0.5
    values = kernel_eigenvalues(x)
    assert vendi_score(x) == pytest.approx(math.exp(scipy.stats.entropy(values)), rel=1e-9)
    for order in (0.5, 2.0, 7.0):
        renyi = math.log((values**order).sum()) / (1 - order)
        assert vendi_score(x, order=order) == pytest.approx(math.exp(renyi), rel=1e-6 if order < 1 else 1e-9)
    assert vendi_score(x, order=math.inf) == pytest.approx(1 / values.max(), rel=1e-9)


def test_orders_without_a_limit():
    x = np.random.default_rng(0).standard_normal((200, 150))
    assert vendi_score(x, order=1 + 1e-6) == pytest.approx(vendi_score(x), rel=1e-4)
    assert vendi_score(x, order=1000.0) == pytest.approx(vendi_score(x, order=math.inf), rel=0.02)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, math.inf])
def test_it_counts_different_images(order):
    assert vendi_score(np.eye(6), order=order) == pytest.approx(6)
    assert vendi_score(np.repeat(np.eye(6), 5, axis=0), order=order) == pytest.approx(6)
    assert vendi_score(np.ones((9, 4)), order=order) == pytest.approx(1)
    assert vendi_score(np.ones((1, 4)), order=order) == pytest.approx(1)


def test_the_length_of_features_does_not_count():
    x = np.random.default_rng(0).standard_normal((20, 5))
    assert vendi_score(x * np.arange(1, 21)[:, None]) == pytest.approx(vendi_score(x), rel=1e-12)


def test_features_without_a_direction_are_refused():
    with pytest.raises(DataError, match="the features of 1 of 3 images are all zero"):
        vendi_score(np.array([[1.0, 0], [0, 0], [0, 1]]))


# ---- The evaluator ----


def found(strength, digits_train, digits_test, **settings):
    evaluator = Vendi(VendiConfig(images=60, variants=3, **settings))
    data = EvaluationData(digits_train, digits_test, "test", noisy(strength))
    evaluator.check(data)
    return dict(evaluator.run(FrozenEncoder(Pixels(), torch.device("cpu")), data)), evaluator.protocol


def test_copies_are_one_image_a_source_and_as_many_as_the_sources_in_all(digits_train, digits_test):
    values, protocol = found(0, digits_train, digits_test)
    assert values["per_source"] == pytest.approx(1, abs=1e-6)
    assert values["variants"] == pytest.approx(values["sources"], rel=1e-9)
    assert 1 < values["per_draw_of_real"] < 3
    assert (protocol["images"], protocol["variants_of_a_source"], protocol["order"]) == (60, 3, 1.0)


def test_more_noise_is_more_diversity(digits_train, digits_test):
    weak, strong = (found(strength, digits_train, digits_test)[0] for strength in (10, 100))
    assert 1 < weak["per_source"] < strong["per_source"] < 3
    assert weak["variants"] < strong["variants"] <= 60
    assert weak["sources"] == strong["sources"]


def test_scores_are_those_of_the_images(digits_train, digits_test):
    asked = []

    def remembering(split, rows, index):
        asked.append((index, list(rows)))
        return noisy(20)(split, rows, index)

    data = EvaluationData(digits_train, digits_test, "test", remembering)
    values = dict(
        Vendi(VendiConfig(images=40, variants=2, order=2.0)).run(FrozenEncoder(Pixels(), torch.device("cpu")), data)
    )
    rows = asked[0][1]
    assert asked == [(0, rows), (1, rows)]
    assert len(set(rows)) == 40
    one, other = (noisy(20)(digits_test, rows, index).reshape(40, -1) / 255 for index in (0, 1))
    per_source = [1 / (kernel_eigenvalues(np.stack(pair)) ** 2).sum() for pair in zip(one, other, strict=True)]
    assert values["per_source"] == pytest.approx(np.mean(per_source), rel=1e-5)
    assert values["variants"] == pytest.approx(1 / (kernel_eigenvalues(one) ** 2).sum(), rel=1e-5)


def test_it_needs_as_many_real_images_as_variants_of_a_source(digits_train, digits_test):
    with pytest.raises(ValidationError, match=r"images is 3 but variants is 4; .* raise images or lower variants"):
        VendiConfig(images=3)
    few = EvaluationData(digits_train, Subset(digits_test, np.arange(3)), "test", noisy(0))
    with pytest.raises(DataError, match=r"evaluate.vendi: 4 images are needed and the test split has 3"):
        Vendi(VendiConfig()).check(few)


def test_it_needs_variants(digits_train, digits_test):
    with pytest.raises(DataError, match=r"evaluate.vendi: this needs variants"):
        Vendi(VendiConfig()).check(EvaluationData(digits_train, digits_test, "test"))
