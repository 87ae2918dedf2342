"""RankMe against the paper's equations in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import RankMeConfig
from genssl.evaluators.representation.rankme import RankMe, drawn_rows, rankme


def with_singular_values(values: list[float], rows: int, columns: int) -> torch.Tensor:
    random = np.random.default_rng(0)
    left = np.linalg.qr(random.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(random.standard_normal((columns, len(values))))[0]
    return torch.from_numpy(left * np.array(values) @ right.T)


@pytest.mark.parametrize(("rows", "columns"), [(200, 16), (16, 200), (30, 30), (2, 5), (500, 1)])
def test_it_equals_equations_1_and_2(rows, columns):
    features = np.random.default_rng(rows).standard_normal((rows, columns)) + 0.5
    values = np.linalg.svd(features, compute_uv=False)
    p = values / np.abs(values).sum() + 1e-7
    expected = math.exp(-sum(share * math.log(share) for share in p))
    assert rankme(torch.from_numpy(features).float()) == pytest.approx(expected, rel=1e-5)
    assert rankme(torch.from_numpy(features)) <= min(rows, columns) + 1e-3


def test_it_is_of_singular_values_and_not_of_the_covariances_eigenvalues():
    """Of singular values 4, 2, 1, 1 it is 2^1.75 = 3.36; the eigenvalues 16, 4, 1, 1 would give 2.28."""
    features = with_singular_values([4.0, 2.0, 1.0, 1.0], rows=40, columns=10)
    assert rankme(features) == pytest.approx(2**1.75, abs=1e-4)  # entropy of 1/2, 1/4, 1/8, 1/8: 1.75 bits
    eigenvalues = np.linalg.eigvalsh(features.numpy().T @ features.numpy())[-4:]
    shares = eigenvalues / eigenvalues.sum()
    assert np.exp(-(shares * np.log(shares)).sum()) == pytest.approx(2.276, abs=0.001)


def test_it_is_of_the_uncentred_matrix():
    constant = torch.ones((50, 8)) * torch.arange(1, 9)
    assert rankme(constant) == pytest.approx(1.0, abs=1e-4)
    assert rankme(torch.zeros((5, 3))) == 0.0


def test_images_need_no_labels_and_are_drawn_once(digits_train, digits_test):
    class Unlabelled:
        name, class_names, image_size = "bare", None, 8

        def __len__(self) -> int:
            return 300

        def image(self, row: int):
            return digits_train.image(row)

        def label(self, row: int) -> int:
            return -1

    class Pixels(torch.nn.Module):
        def encode(self, images):
            return images[:, 0].flatten(1)

    data = EvaluationData(Unlabelled(), Unlabelled(), "test")
    rank_me = RankMe(RankMeConfig(images=100, seed=3))
    rank_me.check(data)
    found = dict(rank_me.run(FrozenEncoder(Pixels(), torch.device("cpu")), data))
    rows = drawn_rows(data.train, 100, "rankme", 3)
    assert len(set(rows)) == 100
    pixels = np.stack([digits_train.image(row)[0].ravel() / 255 for row in rows])
    values = np.linalg.svd(pixels, compute_uv=False)
    p = values / values.sum() + 1e-7
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert rank_me.protocol["images"] == 100


def test_one_image_has_no_rank(digits_test):
    class One:
        name, class_names = "one", None

        def __len__(self) -> int:
            return 1

    with pytest.raises(DataError, match=r"evaluate\.rankme: two images are needed and one has 1 here"):
        RankMe(RankMeConfig()).check(EvaluationData(One(), digits_test, "test"))
