"""Alignment and uniformity against plain float64 loops, and which pairs they are of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import AlignmentUniformityConfig
from genssl.evaluators.representation import alignment_uniformity
from genssl.evaluators.representation.alignment_uniformity import AlignmentUniformity, alignment, uniformity


class Pixels(torch.nn.Module):
    def encode(self, images):
        return images.flatten(1) - 0.3


def unit(features) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.mark.parametrize(("rows", "dim", "alpha", "t"), [(40, 6, 2.0, 2.0), (7, 50, 1.0, 3.0), (2, 3, 2.0, 100.0)])
def test_both_equal_plain_loops(monkeypatch, rows, dim, alpha, t):
    random = torch.Generator().manual_seed(rows)
    x, y = torch.randn((rows, dim), generator=random), torch.randn((rows, dim), generator=random)
    a, b = unit(x), unit(y)
    pairs = [np.exp(-t * ((a[i] - a[j]) ** 2).sum()) for i in range(rows) for j in range(i)]
    distances = [math.dist(a[i], b[i]) ** alpha for i in range(rows)]
    assert alignment(x, y, alpha) == pytest.approx(np.mean(distances), rel=1e-6)
    for chunk in (1024, 3):
        monkeypatch.setattr(alignment_uniformity, "CHUNK", chunk)
        assert uniformity(x, t) == pytest.approx(math.log(np.mean(pairs)), rel=1e-6)


def test_the_extremes():
    point = torch.ones((5, 4))
    assert alignment(point, 3 * point) == pytest.approx(0, abs=1e-12)
    assert alignment(point, -point) == pytest.approx(4)
    assert uniformity(point) == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)


def test_real_and_generated_pairs_are_apart(digits_train, digits_test):
    """Without augmentation two real views are one image, and the first variant here is its negative."""
    still = AlignmentUniformityConfig(images=50, augmentation={"preset": "none"}, variant_index=4)
    asked = []

    def variants(split, rows, index):
        asked.append((split, list(rows), index))
        return np.stack([255 - split.image(row) for row in rows])

    encoder = FrozenEncoder(Pixels(), torch.device("cpu"))
    data = EvaluationData(digits_train, digits_test, "test", variants)
    found = dict(AlignmentUniformity(still).run(encoder, data))
    ((split, rows, index),) = asked
    assert split is digits_test
    assert index == 4
    real = unit(np.stack([digits_test.image(row).ravel() / 255 - 0.3 for row in rows]))
    negative = unit(np.stack([0.7 - digits_test.image(row).ravel() / 255 for row in rows]))
    assert found["alignment_real_real"] == pytest.approx(0, abs=1e-9)
    assert found["alignment_real_variant"] == pytest.approx(((real - negative) ** 2).sum(axis=1).mean(), rel=1e-5)
    assert found["uniformity_variant"] != pytest.approx(found["uniformity_real"])


def test_variants_that_are_the_images_give_what_two_real_views_give(digits_train, digits_test):
    """The same draws of the augmentation: what differs otherwise is due to the variants."""
    data = EvaluationData(
        digits_train, digits_test, "test", lambda split, rows, index: np.stack([split.image(row) for row in rows])
    )
    found = dict(
        AlignmentUniformity(AlignmentUniformityConfig(images=300)).run(
            FrozenEncoder(Pixels(), torch.device("cpu")), data
        )
    )
    assert found["alignment_real_real"] > 0.05
    assert found["alignment_real_variant"] == pytest.approx(found["alignment_real_real"])


def test_without_a_generator_there_are_real_pairs_only(digits_train, digits_test):
    judge = AlignmentUniformity(AlignmentUniformityConfig(images=20, split="train"))
    found = dict(
        judge.run(FrozenEncoder(Pixels(), torch.device("cpu")), EvaluationData(digits_train, digits_test, "t"))
    )
    assert set(found) == {"alignment_real_real", "uniformity_real"}
    assert judge.protocol["split"] == "train"
    assert judge.protocol["variant_index"] is None
