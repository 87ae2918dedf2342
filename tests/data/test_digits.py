from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from genssl.data.base import Split
from genssl.data.configs import DigitsConfig
from genssl.data.decode import decode
from genssl.data.digits import Digits

# The first and last row of each split, and their labels.
PINNED = {
    ("train", 0): ("4341e9a3a34d6527ec382ecece8a0c21", 0),
    ("train", 1436): ("ef0bec8e5d8f86bf7518a90f2e8266a9", 8),
    ("test", 0): ("112bd3a0e11f259de9f454603846783b", 1),
    ("test", 359): ("24a7c94788cf110d0eca0d3e019de94b", 4),
}


@pytest.fixture(scope="module")
def digits() -> dict[Split, Digits]:
    return {"train": Digits(DigitsConfig(), "train"), "test": Digits(DigitsConfig(), "test")}


def source_ids(dataset: Digits) -> set[bytes]:
    return {dataset.source_id(row) for row in range(len(dataset))}


def name_of(image: npt.NDArray[np.float64]) -> bytes:
    """The documented source_id of a digit 0..16, computed without genssl."""
    pixels = np.rint(image * 255 / 16).astype(np.uint8)
    return hashlib.blake2b(b"uint8[1,8,8]" + pixels.tobytes(), digest_size=16).digest()


def test_splits_have_the_documented_sizes_and_share_no_image(digits: dict[Split, Digits]) -> None:
    train, test = source_ids(digits["train"]), source_ids(digits["test"])
    assert (len(digits["train"]), len(digits["test"])) == (1437, 360)
    assert (len(train), len(test)) == (1437, 360)  # no image occurs twice
    assert train.isdisjoint(test)


def test_splits_are_everything_scikit_learn_has(digits: dict[Split, Digits]) -> None:
    bunch = load_digits()
    expected = {name_of(image): int(label) for image, label in zip(bunch.images, bunch.target, strict=True)}
    found = {dataset.source_id(row): dataset.label(row) for dataset in digits.values() for row in range(len(dataset))}
    assert found == expected


def test_both_splits_have_the_same_class_proportions(digits: dict[Split, Digits]) -> None:
    counts = {
        split: np.bincount([dataset.label(row) for row in range(len(dataset))]) for split, dataset in digits.items()
    }
    assert counts["test"].tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    np.testing.assert_array_equal(counts["train"] + counts["test"], np.bincount(load_digits().target))
    np.testing.assert_allclose(counts["train"] / counts["test"], 1437 / 360, rtol=0.05)


@pytest.mark.parametrize(("split", "row"), PINNED)
def test_rows_never_change_between_runs_and_machines(digits: dict[Split, Digits], split: Split, row: int) -> None:
    source_id, label = PINNED[split, row]
    assert (digits[split].source_id(row).hex(), digits[split].label(row)) == (source_id, label)


def test_source_id_is_the_documented_digest_of_the_stored_pixels(digits: dict[Split, Digits]) -> None:
    expected = name_of(load_digits().images[0])  # scikit-learn's first digit is the first of the train split
    assert digits["train"].source_id(0) == expected
    assert digits["train"].stored(0).source_id == expected


def test_image_is_the_stored_digit_in_three_equal_channels(digits: dict[Split, Digits]) -> None:
    for row in (0, 700, 1436):
        stored, image = digits["train"].stored(row), digits["train"].image(row)
        assert (stored.encoding, stored.channels, stored.height, stored.width) == ("raw", 1, 8, 8)
        assert image.shape == (3, 8, 8)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, decode(stored))


def test_pixels_are_stretched_to_the_whole_range(digits: dict[Split, Digits]) -> None:
    image = digits["train"].image(0)[0]
    assert image[0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    values = {int(value) for row in range(len(digits["test"])) for value in np.unique(digits["test"].image(row))}
    assert values == {round(step * 255 / 16) for step in range(17)}


def test_class_names_are_the_digits(digits: dict[Split, Digits]) -> None:
    for dataset in digits.values():
        assert dataset.class_names == list("0123456789")
        assert (dataset.name, dataset.image_size, dataset.skipped) == ("digits", 8, [])
