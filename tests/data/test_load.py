from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from genssl.config.base import ComponentConfig
from genssl.data.base import ImageDataset, Split, StoredImage, UInt8Array, raw_image
from genssl.data.configs import DigitsConfig
from genssl.data.load import Subset, hold_out, load_dataset
from genssl.errors import DataError
from genssl.registry import DATASETS, Entry, UnknownNameError


class Labelled:
    """Flat 8x8 images; image i has grey value i."""

    def __init__(self, labels: list[int]) -> None:
        self.name, self.image_size, self.skipped = "labelled", 8, ["gone.png"]
        self.class_names: list[str] | None = ["a", "b", "c"]
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, row: int) -> UInt8Array:
        return np.full((3, 8, 8), row, np.uint8)

    def label(self, row: int) -> int:
        return self._labels[row]

    def stored(self, row: int) -> StoredImage:
        return raw_image(self.image(row))

    def source_id(self, row: int) -> bytes:
        return self.stored(row).source_id


def greys(dataset: ImageDataset) -> list[int]:
    return [int(dataset.image(row)[0, 0, 0]) for row in range(len(dataset))]


def test_load_dataset_returns_the_split_that_was_asked_for() -> None:
    assert (len(load_dataset(DigitsConfig(), "train")), len(load_dataset(DigitsConfig(), "test"))) == (1437, 360)


def test_load_dataset_suggests_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="'digit' is not one of the datasets; did you mean 'digits'"):
        load_dataset(ComponentConfig(name="digit"), "train")


def test_load_dataset_refuses_an_empty_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(config: ComponentConfig, split: Split) -> Labelled:
        return Labelled([0] if split == "train" else [])

    entry = Entry(name="empty", target=empty, config=ComponentConfig, summary="")
    monkeypatch.setitem(DATASETS._entries, "empty", entry)
    assert len(load_dataset(ComponentConfig(name="empty"), "train")) == 1
    with pytest.raises(DataError, match="dataset empty: the test split has no images"):
        load_dataset(ComponentConfig(name="empty"), "test")


def test_hold_out_is_stratified_and_loses_nothing() -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    rest, part = hold_out(Labelled(labels), 0.2)
    assert Counter(part.label(row) for row in range(len(part))) == {0: 10, 1: 6, 2: 4}
    assert sorted(greys(rest) + greys(part)) == list(range(100))
    assert set(greys(rest)).isdisjoint(greys(part))
    assert greys(rest) == sorted(greys(rest))


def test_hold_out_depends_on_its_seed_alone() -> None:
    dataset = Labelled([0] * 50 + [1] * 50)
    drawn = greys(hold_out(dataset, 0.2, seed=3)[1])
    np.random.seed(1)  # noqa: NPY002 - the global stream must not matter
    assert greys(hold_out(dataset, 0.2, seed=3)[1]) == drawn
    assert greys(hold_out(dataset, 0.2, seed=4)[1]) != drawn


def test_hold_out_takes_at_least_one_of_every_class_but_never_its_only_image() -> None:
    rest, part = hold_out(Labelled([0, 0, 0, 1, 1, 2]), 0.01)
    assert Counter(part.label(row) for row in range(len(part))) == {0: 1, 1: 1}
    assert 5 in greys(rest)


def test_hold_out_works_without_labels() -> None:
    rest, part = hold_out(Labelled([-1] * 10), 0.3)
    assert (len(rest), len(part)) == (7, 3)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2]])
def test_hold_out_refuses_what_cannot_be_split(labels: list[int]) -> None:
    with pytest.raises(DataError, match=f"fraction of 0.5 of its {len(labels)} images cannot be held out"):
        hold_out(Labelled(labels), 0.5)


def test_subset_renumbers_rows_and_keeps_everything_else() -> None:
    dataset = Labelled([0, 1, 2, 0, 1])
    subset = Subset(dataset, np.array([4, 1]))
    assert len(subset) == 2
    assert greys(subset) == [4, 1]
    assert [subset.label(row) for row in range(2)] == [1, 1]
    assert [subset.source_id(row) for row in range(2)] == [dataset.source_id(4), dataset.source_id(1)]
    assert subset.stored(0) == dataset.stored(4)
    assert (subset.name, subset.class_names, subset.image_size) == ("labelled", ["a", "b", "c"], 8)
    assert subset.skipped == ["gone.png"]


def test_hold_out_leaves_every_class_at_least_one_image_to_train_on() -> None:
    rest, part = hold_out(Labelled([0] * 10 + [1, 1]), 0.8)
    assert {rest.label(row) for row in range(len(rest))} == {0, 1}
    assert {part.label(row) for row in range(len(part))} == {0, 1}
