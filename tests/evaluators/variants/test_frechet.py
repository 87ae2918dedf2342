"""The Frechet distance against its formula, where it is known, and where it is easily wrong."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.linalg
import torch
from variants_of_digits import Pixels, noisy

from genssl.data.load import Subset
from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import FrechetConfig
from genssl.evaluators.variants.frechet import Frechet, frechet_distance, too_few


def by_matrix_root(x, y):
    """Heusel et al. 2017 with covariances and the symmetric form of the root, by eigenvalues."""
    means = x.mean(0), y.mean(0)
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(covariances[0])
    half = vectors * np.sqrt(values.clip(min=0)) @ vectors.T  # SciPy's sqrtm is off in the fourth digit if singular
    shared = np.sqrt(np.linalg.eigvalsh(half @ covariances[1] @ half).clip(min=0)).sum()
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * shared


def by_product(x, y):
    """With SciPy's root of the product itself, where it is regular."""
    root = scipy.linalg.sqrtm(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return mean + np.trace(np.cov(x, rowvar=False)) + np.trace(np.cov(y, rowvar=False)) - 2 * np.trace(root)


def two_sets(n, d, seed=0):
    random = np.random.default_rng((seed, n, d))
    mixing = random.standard_normal((d, d)) / np.sqrt(d)
    return random.standard_normal((n, d)) @ mixing + 3, random.standard_normal((n, d)) * np.linspace(0.1, 2, d)


@pytest.mark.parametrize(("n", "d"), [(200, 3), (60, 20), (500, 64), (2, 5), (10, 40), (64, 64)])
def test_it_equals_the_formula(n, d):
    x, y = two_sets(n, d)
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-5)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    if n > 2 * d:
        assert frechet_distance(x, y) == pytest.approx(by_product(x, y), rel=1e-9)


def test_of_many_samples_it_is_the_distance_of_the_gaussians():
    random = np.random.default_rng(0)
    scales = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5])
    x, y = (random.standard_normal((200_000, 3)) * scale + shift for scale, shift in zip(scales, (0, 1), strict=True))
    assert frechet_distance(x, y) == pytest.approx(3 + ((scales[0] - scales[1]) ** 2).sum(), rel=0.01)


@pytest.mark.parametrize(("n", "d"), [(500, 32), (33, 32), (20, 100), (2, 2048), (7, 512)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_equal_sets_are_0_apart_also_with_fewer_images_than_dimensions(n, d, offset):
    x, _ = two_sets(n, d)
    order = np.random.default_rng(1).permutation(n)
    distance = frechet_distance(x + offset, x[order] + offset)
    assert 0 <= distance < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_it_is_a_number_and_never_negative(seed):
    random = np.random.default_rng(seed)
    x = random.standard_normal((12, 300)).astype(np.float32)
    for y in (x + 1e-7 * random.standard_normal(x.shape), np.repeat(x[:1], 12, axis=0), np.zeros_like(x)):
        distance = frechet_distance(torch.from_numpy(x), y.astype(np.float32))
        assert np.isfinite(distance)
        assert distance >= 0


def test_it_is_the_squared_distance_of_points():
    x, y = np.repeat([[1.0, 2.0]], 5, axis=0), np.repeat([[4.0, 6.0]], 5, axis=0)
    assert frechet_distance(x, y) == pytest.approx(25, abs=1e-12)


def test_distances_of_few_images_are_too_large_which_is_why_numbers_must_be_equal():
    random = np.random.default_rng(0)
    few, many = (frechet_distance(*random.standard_normal((2, n, 64))) for n in (100, 3000))
    assert few > 10 * many
    x = random.standard_normal((40, 4))
    with pytest.raises(DataError, match="40 images against 39; the distance depends on their number, so give two sets"):
        frechet_distance(x, x[1:])
    with pytest.raises(ValueError, match=r"not \(40, 4\) and \(40, 3\)"):
        frechet_distance(x, x[:, 1:])


# ---- The evaluator ----


@pytest.fixture
def encoder() -> FrozenEncoder:
    return FrozenEncoder(Pixels(), torch.device("cpu"))


def test_variants_are_measured_against_other_real_images(encoder, digits_train, digits_test):
    data = EvaluationData(digits_train, digits_test, "test", noisy(0))
    evaluator = Frechet(FrechetConfig(images=90))
    found = dict(evaluator.run(encoder, data))
    assert found["distance"] == pytest.approx(found["distance_of_real"]), "copies of the sources are as real as they"
    assert found["distance"] > 0.1, "a copy is no better than its source, though equal to it"
    worse = dict(
        Frechet(FrechetConfig(images=90)).run(encoder, EvaluationData(digits_train, digits_test, "t", noisy(60)))
    )
    assert worse["distance"] > 1.1 * worse["distance_of_real"]
    assert worse["distance_of_real"] == found["distance_of_real"]
    assert evaluator.protocol["images"] == 90
    assert evaluator.protocol["split"] == "test"


def test_half_of_a_small_split_are_sources_and_the_other_half_is_not(encoder, digits_train, digits_test):
    asked = []

    def remembering(split, rows, index):
        asked.extend(rows)
        assert (split, index) == (digits_test, 3)
        return noisy(0)(split, rows, index)

    evaluator = Frechet(FrechetConfig(variant_index=3))
    dict(evaluator.run(encoder, EvaluationData(digits_train, digits_test, "test", remembering)))
    assert evaluator.protocol["images"] == 180 == len(set(asked))


def test_the_result_is_that_of_the_images_it_says(encoder, digits_train, digits_test):
    """Recomputed outside: the rows are found through the variants that were asked for."""
    asked = []

    def remembering(split, rows, index):
        asked.extend(rows)
        return noisy(30)(split, rows, index)

    found = dict(
        Frechet(FrechetConfig(split="train")).run(
            encoder, EvaluationData(digits_train, digits_test, "test", remembering)
        )
    )
    others = sorted(set(range(len(digits_train))) - set(asked))
    assert (len(asked), len(others)) == (718, 719), "of an odd number one is left out"
    pixels = np.stack([digits_train.image(row).ravel() / 255 for row in others])
    variants = noisy(30)(digits_train, asked, 0).reshape(len(asked), -1) / 255
    candidates = [by_matrix_root(np.delete(pixels, out, axis=0), variants) for out in (0, 400, 718)]
    assert found["distance"] == pytest.approx(np.mean(candidates), rel=0.01)


def test_singular_covariances_are_warned_of(encoder, digits_train, digits_test, caplog):
    evaluator = Frechet(FrechetConfig(images=100))
    with caplog.at_level(logging.WARNING, "genssl"):
        dict(evaluator.run(encoder, EvaluationData(digits_train, digits_test, "test", noisy(0))))
    assert "100 images a set are no more than the 192 dimensions" in evaluator.protocol["warning"]
    assert evaluator.protocol["warning"] in caplog.text
    assert too_few(193, 192) is None
    assert too_few(192, 192) is not None


def test_it_needs_variants_and_images(digits_train, digits_test):
    with pytest.raises(DataError, match=r"evaluate.frechet: this needs variants"):
        Frechet(FrechetConfig()).check(EvaluationData(digits_train, digits_test, "test"))
    three = Subset(digits_test, np.arange(3))
    with pytest.raises(DataError, match=r"evaluate.frechet: 4 images are needed and the test split has 3"):
        Frechet(FrechetConfig()).check(EvaluationData(digits_train, three, "test", noisy(0)))
    Frechet(FrechetConfig()).check(EvaluationData(digits_train, digits_test, "test", noisy(0)))
