"""CKA and Procrustes distance against their formulas, and the traps that published numbers fell into."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
import torch

from genssl.errors import DataError
from genssl.evaluators.representation import similarity
from genssl.evaluators.representation.similarity import bootstrap_cka, bootstrap_opd, cka, opd

SHAPES = [(12, 3, 5), (40, 7, 4), (30, 60, 10), (16, 200, 300)]  # N, P, Q; fewer images than features included


def features(n, p, q, seed=0, shared=0.5):
    """Correlated features with means far from 0 and a spectrum that is not flat."""
    random = np.random.default_rng((seed, n, p, q))
    hidden = random.standard_normal((n, 3))
    x = shared * hidden @ random.standard_normal((3, p)) + random.standard_normal((n, p)) * np.linspace(2, 0.1, p)
    y = shared * hidden @ random.standard_normal((3, q)) + random.standard_normal((n, q)) + 10
    return x, y


# ---- Independent formulas ----


def hsic_1(k, m):
    """Song et al. 2007 with plain traces."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def plain_cka(x, y, hsic=hsic_1):
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def plain_biased_cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def weighted_hsic(k, m, w):
    """The U-statistic tuple by tuple, each weighted by how often its images were drawn."""
    means = []
    for size, term in ((2, lambda i, j: k[i, j] * m[i, j]), (4, lambda i, j, q, r: k[i, j] * m[q, r])):
        tuples = list(permutations(range(len(w)), size))
        weights = np.array([np.prod(w[list(one)]) for one in tuples])
        means.append((weights * [term(*one) for one in tuples]).sum() / weights.sum())
    tuples = list(permutations(range(len(w)), 3))
    weights = np.array([np.prod(w[list(one)]) for one in tuples])
    means.append((weights * [k[i, j] * m[i, q] for i, j, q in tuples]).sum() / weights.sum())
    return means[0] + means[1] - 2 * means[2]


@pytest.mark.parametrize(("n", "p", "q"), SHAPES)
def test_cka_equals_its_formulas(n, p, q):
    x, y = features(n, p, q)
    assert cka(x, y) == pytest.approx(plain_cka(x - x.mean(0), y - y.mean(0)), abs=1e-10)
    assert cka(x, y, estimator="biased") == pytest.approx(plain_biased_cka(x, y), abs=1e-10)
    centring = np.eye(n) - 1 / n
    gram = plain_cka(x, y, hsic=lambda k, m: np.trace(k @ centring @ m @ centring))
    assert cka(x, y, estimator="biased") == pytest.approx(gram, abs=1e-9)


@pytest.mark.parametrize(("n", "p", "q"), SHAPES)
def test_opd_is_the_squared_distance_after_the_best_rotation(n, p, q):
    x, y = features(n, p, q)
    a, b = x - x.mean(0), y - y.mean(0)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    width = max(p, q)
    a, b = (np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in (a, b))
    rotation, _ = scipy.linalg.orthogonal_procrustes(a, b)
    assert opd(x, y) == pytest.approx(np.linalg.norm(a @ rotation - b) ** 2, abs=1e-9)


@pytest.mark.parametrize(("n", "p", "q"), SHAPES)
def test_the_legacy_distance_is_that_of_the_released_code(n, p, q):
    def normalised(z):  # of [features, images], transposed before the mean over axis 1
        z = z.T - z.T.mean(axis=1, keepdims=True)
        return z / np.linalg.norm(z)

    x, y = features(n, p, q)
    a, b = normalised(x.T), normalised(y.T)
    released = np.linalg.norm(a) ** 2 + np.linalg.norm(b) ** 2 - 2 * np.linalg.norm(a.T @ b, ord="nuc")
    assert opd(x, y, centring="legacy_paper") == pytest.approx(released, abs=1e-9)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x, y = features(50, 6, 9)
    whole = cka(x, y), cka(x, y, estimator="biased"), bootstrap_cka(x, y, resamples=30)
    monkeypatch.setattr(similarity, "ROWS", 7)
    monkeypatch.setattr(similarity, "RESAMPLES", 4)
    parts = cka(x, y), cka(x, y, estimator="biased"), bootstrap_cka(x, y, resamples=30)
    np.testing.assert_allclose([*parts[:2], parts[2].low, parts[2].high], [*whole[:2], whole[2].low, whole[2].high])


def test_resamples_are_u_statistics_over_distinct_images(monkeypatch):
    monkeypatch.setattr(similarity, "FEWEST_FOR_INTERVAL", 7)
    x, y = features(7, 3, 2, shared=3.0)
    counts = np.concatenate(list(similarity._counts(7, 5, 3, 2)))
    k, m = (one @ one.T for one in (x - x.mean(0), y - y.mean(0)))
    expected = [
        weighted_hsic(k, m, w) / np.sqrt(weighted_hsic(k, k, w) * weighted_hsic(m, m, w)) for w in counts.astype(float)
    ]
    drawn = bootstrap_cka(x, y, resamples=5, seed=3)
    assert (drawn.low, drawn.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-9)
    assert counts.sum(axis=1).tolist() == [7] * 5
    assert (counts > 1).any(axis=1).all(), "else this would not be about repeated images"


@pytest.mark.parametrize("estimator", ["biased", "legacy_paper", "features"])
def test_other_resamples_are_the_statistic_of_the_drawn_rows(estimator):
    x, y = features(25, 4, 30)
    statistic, draw = {
        "biased": (lambda a, b: cka(a, b, estimator="biased"), lambda: bootstrap_cka(x, y, estimator="biased", **how)),
        "features": (lambda a, b: opd(a, b), lambda: bootstrap_opd(x, y, **how)),
        "legacy_paper": (
            lambda a, b: opd(a, b, centring="legacy_paper"),
            lambda: bootstrap_opd(x, y, centring="legacy_paper", **how),
        ),
    }[estimator]
    how = {"resamples": 12, "seed": 5}
    rows = [np.repeat(np.arange(25), counts) for part in similarity._counts(25, 12, 5, 12) for counts in part]
    values = np.array([statistic(x[drawn], y[drawn]) for drawn in rows])
    low, high = np.quantile(values, [0.025, 0.975]) + statistic(x, y) - values.mean()
    found = draw()
    assert (found.low, found.high, found.value) == pytest.approx((low, high, statistic(x, y)), abs=1e-9)


# ---- What they are invariant to ----


def test_rotation_scale_and_shift_are_not_a_difference():
    x, _ = features(30, 8, 2)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((8, 8)))[0]
    moved = 3 * x @ rotation + 100
    for estimator in ("biased", "debiased"):
        assert cka(x, moved, estimator=estimator) == pytest.approx(1, abs=1e-9)
    assert opd(x, moved) == pytest.approx(0, abs=1e-9)
    assert opd(x, moved) >= 0
    interval = bootstrap_cka(x, moved, resamples=50)
    assert (interval.low, interval.high) == pytest.approx((1, 1), abs=1e-9)


def test_arguments_may_be_float32_tensors_and_are_left_alone():
    x, y = features(20, 5, 6)
    single = torch.from_numpy(x).float()
    before = single.clone()
    assert cka(single, y) == pytest.approx(cka(single.double().numpy(), y), abs=1e-12)
    opd(single, y)
    assert torch.equal(single, before)
    assert single.dtype == torch.float32


# ---- Traps ----


def test_the_biased_estimate_calls_unrelated_features_alike_when_images_are_few():
    random = np.random.default_rng(0)
    biased, debiased = zip(
        *[
            (cka(x, y, estimator="biased"), cka(x, y))
            for x, y in (random.standard_normal((2, 64, 256)) for _ in range(20))
        ],
        strict=True,
    )
    assert np.mean(biased) > 0.75
    assert abs(np.mean(debiased)) < 0.02


def test_the_interval_of_the_debiased_estimate_keeps_0_though_images_are_drawn_twice():
    x, y = np.random.default_rng(1).standard_normal((2, 64, 256))
    found = bootstrap_cka(x, y, resamples=200)
    assert found.low < 0 < found.high
    rows = np.random.default_rng(2).integers(0, 64, (20, 64))
    naive = [cka(x[drawn], y[drawn]) for drawn in rows]
    assert min(naive) > found.high, "resampling rows would bring the bias back"


def test_the_released_centring_leaves_in_the_mean_that_all_images_share():
    random = np.random.default_rng(0)
    mean = 20 * random.random(32)
    x, y = (random.random((500, 32)) + mean for _ in range(2))
    assert opd(x, y) > 1.4
    assert opd(x, y, centring="legacy_paper") < 0.05


def test_intervals_cover_what_they_estimate():
    """Of CKA, its value for the whole population, 95 times in 100; of OPD, its mean over samples of this size."""
    mixing = np.random.default_rng(9).standard_normal((4, 4))
    spread = np.diag([4.0, 1.0, 1.0, 0.25])
    cross, second = 0.3 * spread @ mixing, 0.09 * mixing.T @ spread @ mixing + 0.49 * np.eye(4)
    true = np.linalg.norm(cross) ** 2 / np.linalg.norm(spread) / np.linalg.norm(second)
    found = []
    for seed in range(120):
        random = np.random.default_rng(seed)
        x = random.standard_normal((60, 4)) @ np.sqrt(spread)
        y = 0.3 * x @ mixing + 0.7 * random.standard_normal((60, 4))
        found.append((bootstrap_cka(x, y, resamples=200, seed=seed), bootstrap_opd(x, y, resamples=80, seed=seed)))
    mean = np.mean([distance.value for _, distance in found])
    assert 0.88 <= np.mean([alike.low <= true <= alike.high for alike, _ in found]) <= 0.99
    assert 0.86 <= np.mean([distance.low <= mean <= distance.high for _, distance in found]) <= 0.99


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    x, y = features(40, 5, 5)
    assert bootstrap_cka(x, y, resamples=50, seed=1) == bootstrap_cka(x, y, resamples=50, seed=1)
    assert bootstrap_cka(x, y, resamples=50, seed=1) != bootstrap_cka(x, y, resamples=50, seed=2)
    assert bootstrap_opd(x, y, resamples=50, seed=1) == bootstrap_opd(x, y, resamples=50, seed=1)


# ---- What cannot be compared ----


def test_a_collapsed_encoder_is_named():
    x, _ = features(30, 5, 5)
    with pytest.raises(DataError, match="the second encoder gives all 30 images the same features"):
        cka(x, np.full((30, 4), 0.1))
    with pytest.raises(DataError, match="the first encoder gives all 30 images the same features"):
        opd(np.full((30, 4), 1e6) / 3, x)


@pytest.mark.parametrize("bootstrap", [bootstrap_cka, bootstrap_opd])
def test_features_that_one_image_alone_varies_have_no_interval(bootstrap):
    x, _ = features(30, 5, 5)
    spike = np.zeros((30, 3))
    spike[4] = 1
    with pytest.raises(DataError, match="resamples have no value, since an encoder gives nearly all of the images the"):
        bootstrap(x, spike, resamples=50)


def test_too_few_images_are_refused():
    x, y = features(19, 3, 3)
    with pytest.raises(DataError, match="3 images are too few; give 4 or more"):
        cka(x[:3], y[:3])
    with pytest.raises(DataError, match="19 images are too few; give 20 or more"):
        bootstrap_opd(x, y)


def test_features_of_other_images_are_a_mistake():
    x, y = features(19, 3, 3)
    with pytest.raises(ValueError, match=r"not \[\(19, 3\), \(18, 3\)\]"):
        cka(x, y[1:])
