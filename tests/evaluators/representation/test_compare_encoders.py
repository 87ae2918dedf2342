"""Two encoders on the same images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genssl.errors import DataError
from genssl.evaluators.base import FrozenEncoder
from genssl.evaluators.representation.compare_encoders import Resized, compare_encoders
from genssl.evaluators.representation.rankme import drawn_rows
from genssl.evaluators.representation.similarity import cka, opd


class Projection(nn.Module):
    """Some fixed directions of the pixels."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        weights = torch.randn((192, width), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weights", weights / 14)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) @ self.weights).relu()


class Corner(nn.Module):
    """Takes images of any size."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 1:4, 1:4].flatten(1)


def frozen(width: int, seed: int) -> FrozenEncoder:
    return FrozenEncoder(Projection(width, seed), torch.device("cpu"))


def test_the_measures_are_of_the_encoders_features(digits_test):
    rows = list(range(0, 300, 3))
    first, second = frozen(20, 0), frozen(12, 1)
    found = compare_encoders(first, second, digits_test, rows=rows, resamples=100)
    x, y = first.encode_rows(digits_test, rows), second.encode_rows(digits_test, rows)
    assert found.cka_debiased.value == cka(x, y)
    assert found.cka_biased.value == cka(x, y, estimator="biased")
    assert found.opd.value == pytest.approx(opd(x, y), abs=1e-12)
    assert found.opd_legacy == opd(x, y, centring="legacy_paper")
    assert (found.images, found.dimensions, found.resamples, found.opd_resamples) == (100, (20, 12), 100, 100)
    for one in (found.cka_debiased, found.cka_biased, found.opd):
        assert one.low < one.value < one.high


def test_an_encoder_is_like_itself_and_less_like_another(digits_test):
    same = compare_encoders(frozen(20, 0), frozen(20, 0), digits_test, resamples=100)
    assert same.images == 360
    assert same.cka_debiased.value == pytest.approx(1)
    assert (same.opd.value, same.opd.low, same.opd_legacy) == pytest.approx((0, 0, 0), abs=1e-9)
    other = compare_encoders(frozen(20, 0), frozen(3, 5), digits_test, resamples=100)
    assert other.cka_debiased.high < 0.95
    assert other.opd.low > 0.05


def test_each_encoder_may_see_the_images_at_its_own_size(digits_test):
    rows, smaller = range(50), Resized(digits_test, 4)
    corner = FrozenEncoder(Corner(), torch.device("cpu"))
    found = compare_encoders(frozen(20, 0), corner, digits_test, smaller, rows=rows, resamples=100)
    x, y = frozen(20, 0).encode_rows(digits_test, rows), corner.encode_rows(smaller, rows)
    assert found.cka_debiased.value == cka(x, y)
    assert found.cka_debiased.value != cka(x, corner.encode_rows(digits_test, rows))


def test_distances_are_resampled_less_often(digits_test):
    found = compare_encoders(frozen(4, 0), frozen(3, 1), digits_test, rows=range(30), resamples=300)
    assert (found.resamples, found.opd_resamples) == (300, 200)


def test_too_few_images_are_refused(digits_test):
    with pytest.raises(DataError, match="19 images are too few; give 20 or more"):
        compare_encoders(frozen(4, 0), frozen(4, 1), digits_test, rows=range(19))


def test_rows_are_drawn_by_the_seed(digits_test):
    assert drawn_rows(digits_test, 50, 1) == drawn_rows(digits_test, 50, 1)
    assert drawn_rows(digits_test, 50, 1) != drawn_rows(digits_test, 50, 2)
    assert drawn_rows(digits_test, 1000, 0) == list(range(360))


def test_resized_images_are_the_same_images(digits_test):
    larger = Resized(digits_test, 16)
    assert (len(larger), larger.image_size, larger.name) == (360, 16, "digits")
    assert larger.image(5).shape == (3, 16, 16)
    assert larger.image(5).dtype == np.uint8
    assert larger.label(5) == digits_test.label(5)
    assert larger.source_id(5) == digits_test.source_id(5)
    assert larger.stored(5) == digits_test.stored(5)
    for size in (5, 16, 224):
        picture = Image.fromarray(digits_test.image(5).transpose(1, 2, 0)).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        expected = np.asarray(picture).transpose(2, 0, 1).astype(int)
        assert np.abs(Resized(digits_test, size).image(5) - expected).max() <= 1
