"""Precision, recall, density and coverage against plain loops, the closed form of coverage, and what copies get."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from variants_of_digits import Pixels, noisy

from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import PRDCConfig
from genssl.evaluators.variants import prdc as module
from genssl.evaluators.variants.prdc import PRDC, expected_coverage, prdc


def by_loops(real, fake, k):
    """The definitions, image by image (Naeem et al. 2020, equations 1 to 6)."""

    def radius(one, own):
        return sorted(np.linalg.norm(one - other) for other in own)[k]  # 0 is its distance to itself

    balls = [radius(x, real) for x in real], [radius(y, fake) for y in fake]
    inside = [[np.linalg.norm(y - x) < ball for x, ball in zip(real, balls[0], strict=True)] for y in fake]
    recalled = [any(np.linalg.norm(x - y) < ball for y, ball in zip(fake, balls[1], strict=True)) for x in real]
    covered = [any(inside[j][i] for j in range(len(fake))) for i in range(len(real))]
    return np.mean([any(row) for row in inside]), np.mean(recalled), np.sum(inside) / (k * len(fake)), np.mean(covered)


@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(30, 30, 2, 5), (25, 40, 7, 3), (12, 9, 100, 1), (40, 15, 3, 14), (6, 6, 1, 5)]
)
def test_they_equal_plain_loops(n, m, d, k):
    random = np.random.default_rng((n, m, d))
    real, fake = random.standard_normal((n, d)), 0.7 * random.standard_normal((m, d)) + 0.5
    assert astuple(prdc(real, fake, k)) == pytest.approx(by_loops(real, fake, k), abs=1e-12)


def test_chunks_change_nothing(monkeypatch):
    real, fake = np.random.default_rng(0).standard_normal((2, 50, 4))
    whole = prdc(real, fake)
    monkeypatch.setattr(module, "ELEMENTS", 170)  # three rows at a time
    assert prdc(real, fake) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_set_and_its_copy(dtype, offset):
    """Strictly inside: its own ball, and those of the k - 1 nearer neighbours' own count."""
    features = torch.randn((60, 30), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) + offset
    found = prdc(features, features.clone(), k=5)
    assert astuple(found) == (1.0, 1.0, 1.0, 1.0)


def test_on_the_edge_of_a_ball_is_outside():
    real = np.array([[0.0], [1.0]])
    found = prdc(real, np.array([[2.0], [-1.0]]), k=1)
    assert (found.precision, found.density, found.coverage) == (0, 0, 0)
    assert prdc(real, np.array([[1.999], [-1.0]]), k=1).precision == 0.5


def test_sets_far_apart_share_nothing_and_one_mode_covers_little():
    random = np.random.default_rng(0)
    real = np.concatenate([random.standard_normal((50, 2)), random.standard_normal((50, 2)) + 100])
    apart = prdc(real, random.standard_normal((100, 2)) + 1000)
    assert astuple(apart) == (0, 0, 0, 0)
    one_mode = prdc(real, random.standard_normal((100, 2)))
    assert one_mode.precision > 0.9
    assert one_mode.recall < 0.55
    assert one_mode.coverage <= 0.5


# ---- Equal distributions ----


@pytest.mark.parametrize(("n", "m", "k"), [(40, 40, 1), (40, 40, 5), (30, 60, 3), (60, 20, 2)])
def test_coverage_of_equal_distributions_is_what_the_paper_derives(n, m, k):
    random = np.random.default_rng((n, m, k))
    found = [prdc(random.standard_normal((n, 8)), random.standard_normal((m, 8)), k).coverage for _ in range(150)]
    spread = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - expected_coverage(n, m, k)) < 4 * spread


def test_the_closed_form_is_the_chance_that_all_nearest_neighbours_are_real():
    """k draws without replacement from N - 1 real and M generated images."""
    from math import comb

    for n, m, k in ((10, 10, 3), (7, 30, 5), (1000, 1000, 5)):
        assert expected_coverage(n, m, k) == pytest.approx(1 - comb(n - 1, k) / comb(n + m - 1, k), rel=1e-12)
    assert expected_coverage(10_000, 10_000, 5) == pytest.approx(1 - 2**-5, abs=1e-3)


def test_density_of_equal_distributions_is_about_1():
    random = np.random.default_rng(0)
    found = [prdc(*random.standard_normal((2, 100, 3))).density for _ in range(60)]
    assert np.mean(found) == pytest.approx(1, abs=0.03)


def test_k_must_be_below_both_numbers():
    features = np.zeros((5, 2))
    with pytest.raises(DataError, match="k is 5, but there are 5 real and 9 generated images; lower k"):
        prdc(features, np.zeros((9, 2)))


# ---- The evaluator ----


def test_variants_lie_among_other_real_images_as_far_as_they_are_real(digits_train, digits_test):
    encoder = FrozenEncoder(Pixels(), torch.device("cpu"))
    evaluator = PRDC(PRDCConfig())
    copies, blurred = (
        dict(evaluator.run(encoder, EvaluationData(digits_train, digits_test, "test", noisy(strength))))
        for strength in (0, 80)
    )
    for name in ("precision", "recall", "density", "coverage"):
        assert copies[name] == copies[f"{name}_of_real"] == blurred[f"{name}_of_real"]
    assert blurred["density"] < 0.5 * copies["density"]
    assert blurred["precision"] < copies["precision"]
    assert abs(copies["coverage"] - evaluator.protocol["coverage_if_equally_distributed"]) < 0.1
    assert (evaluator.protocol["images"], evaluator.protocol["k"]) == (180, 5)


def test_it_needs_images_for_its_neighbours(digits_train, digits_test):
    data = EvaluationData(digits_train, digits_test, "test", noisy(0))
    PRDC(PRDCConfig(k=179)).check(data)
    with pytest.raises(DataError, match=r"evaluate.prdc: 362 images are needed and the test split has 360"):
        PRDC(PRDCConfig(k=180)).check(data)
    with pytest.raises(DataError, match=r"evaluate.prdc: this needs variants"):
        PRDC(PRDCConfig()).check(EvaluationData(digits_train, digits_test, "test"))
