"""Frozen encoders and evaluation data: what the evaluators build on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genssl.data.configs import FolderConfig
from genssl.data.folder import ImageFolder
from genssl.errors import DataError, UserError
from genssl.evaluators import base
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.units import shown

CPU = torch.device("cpu")


class Linear(nn.Module):
    """Remembers the sizes of the batches that it is given."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn((192, 7), generator=torch.Generator().manual_seed(0)) * scale)
        self.batches: list[int] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return images.flatten(1) @ self.weights


def test_images_rows_and_splits_have_the_same_features(digits_test):
    encoder = FrozenEncoder(Linear(), CPU)
    images = np.stack([digits_test.image(row) for row in range(len(digits_test))])
    expected = images.reshape(len(images), -1) / 255 @ Linear().weights.detach().double().numpy()
    for found in (
        encoder.features(digits_test).features,
        encoder.encode(images),
        encoder.encode(torch.from_numpy(images)),
        encoder.encode(torch.from_numpy(images).float() / 255),
        encoder.encode_rows(digits_test, range(len(images))),
    ):
        assert found.dtype == torch.float32
        assert not found.is_inference()  # so that probes can train on them
        assert found.numpy() == pytest.approx(expected, abs=1e-4)


def test_memory_is_bounded_by_batches_which_shrink_with_the_image(monkeypatch, digits_test):
    monkeypatch.setattr(base, "BATCH", 100)
    module = Linear()
    FrozenEncoder(module, CPU).features(digits_test)
    assert module.batches == [100, 100, 100, 60]

    class Mean(Linear):
        def encode(self, images):
            self.batches.append(len(images))
            return images.mean(dim=(2, 3))

    large = Mean()
    FrozenEncoder(large, CPU).encode(np.zeros((120, 3, 384, 384), np.uint8))
    assert max(large.batches) == 512 * 96 * 96 // 384**2 == 32


def test_two_splits_are_not_taken_for_each_other(digits_train):
    """Even where one is gone and the other has its place in memory."""
    encoder = FrozenEncoder(Linear(), CPU)

    class One:
        name, class_names, image_size = "one", ["a"], 8

        def __init__(self, row: int) -> None:
            self.row = row

        def __len__(self) -> int:
            return 1

        def label(self, row: int) -> int:
            return 0

        def image(self, row: int):
            return digits_train.image(self.row)

    found = [encoder.features(One(row)).features for row in range(20)]
    assert len({tuple(features[0].tolist()) for features in found}) == 20


def test_a_copy_can_be_trained_and_the_encoder_stays():
    module = Linear()
    encoder = FrozenEncoder(module, CPU)
    copy = encoder.copy_of_module()
    copy.encode(torch.rand((4, 3, 8, 8))).sum().backward()
    torch.optim.SGD(copy.parameters(), lr=1.0).step()
    assert not torch.equal(copy.weights, module.weights)
    assert torch.equal(module.weights, Linear().weights)
    assert not module.weights.requires_grad


def test_what_is_not_there_is_one_clear_error(digits_train, digits_test):
    data = EvaluationData(digits_train, digits_test, "test")
    with pytest.raises(DataError, match=r"evaluate\.vendi: this needs variants .*give the recipe a `generator`"):
        data.require_variants("evaluate.vendi")

    def variants(split, rows, index):
        return np.stack([split.image(row) for row in rows])

    assert EvaluationData(digits_train, digits_test, "test", variants).require_variants("x") is variants

    class NoneLabelled:
        name, class_names, image_size = "bare", ["a", "b"], 8

        def __len__(self) -> int:
            return 2

        def label(self, row: int) -> int:
            return -1

    for one, other in ((NoneLabelled(), digits_test), (digits_train, NoneLabelled())):
        with pytest.raises(DataError, match=r"evaluate\.knn: the evaluators need labels and bare has none here"):
            EvaluationData(one, other, "test").require_labels("evaluate.knn")


def test_features_that_are_not_finite_are_one_clear_error(digits_test):
    with pytest.raises(UserError, match="features are not finite, so the training has diverged"):
        FrozenEncoder(Linear(scale=float("inf")), CPU).features(digits_test)


def test_accuracies_are_shown_in_percent_and_other_values_are_not():
    assert shown("knn/top1", 0.61944) == "61.94 %"
    assert shown("few_shot/top1@5_low", 0.5) == "50.00 %"
    assert shown("rankme/effective_rank", 18.98804) == "18.99"
    assert shown("alignment_uniformity/uniformity_real", -0.72788) == "-0.7279"


def test_files_are_read_ahead_in_order_and_a_corrupt_one_is_named(monkeypatch, tmp_path):
    for number in range(23):
        Image.fromarray(np.full((20, 30, 3), 10 * number, np.uint8)).save(tmp_path / f"{number:02}.png")
    folder = ImageFolder(FolderConfig(root=tmp_path, image_size=8, labels="none", test_fraction=0.01), "train")
    monkeypatch.setattr(base, "BATCH", 5)
    rows = list(range(len(folder)))[::-1]
    features = FrozenEncoder(Linear(), CPU).encode_rows(folder, rows)
    expected = np.stack([folder.image(row) for row in rows]).reshape(len(rows), -1) / 255
    assert features.numpy() == pytest.approx(expected @ Linear().weights.detach().double().numpy(), abs=1e-4)
    Path(folder._paths[9]).write_bytes(b"no image")
    with pytest.raises(DataError, match=Path(folder._paths[9]).name):
        FrozenEncoder(Linear(), CPU).encode_rows(folder, rows)
