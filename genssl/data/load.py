"""Makes the splits that a run trains and is judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from genssl.base.wording import counted
from genssl.config.base import ComponentConfig
from genssl.data.base import ImageDataset, Split, StoredImage, UInt8Array
from genssl.data.folder import by_suffix
from genssl.errors import DataError
from genssl.registry import DATASETS

DIGESTED = 10_000


def load_dataset(config: ComponentConfig, split: Split) -> ImageDataset:
    """Returns a split of the data set that the config names; raises DataError if it is absent, empty or corrupt."""
    dataset: ImageDataset = DATASETS.get(config.name)(config, split)
    if len(dataset) == 0:
        raise DataError(f"dataset {config.name}: the {split} split has no images")
    return dataset


def left_out_note(*splits: ImageDataset) -> str | None:
    """Says which files are left out of splits, and names one of each kind; None if there are none.

    They are the corrupt ones, under `on_corrupt: skip`, and images of formats that are not read.
    """
    notes = []
    if skipped := sorted({path for split in splits for path in split.skipped}):
        files = counted(len(skipped), "corrupt file is", "corrupt files are")
        notes.append(f"{files} left out, such as {skipped[0]}")
    if unread := sorted({path for split in splits for path in unread_of(split)}):
        notes.append(f"left out: {by_suffix(unread)}, formats that are not read, such as {unread[0]}")
    return "; ".join(notes) or None


def unread_of(split: ImageDataset) -> list[str]:
    """Returns the paths of images of formats that are not read, which lie beside those of a split."""
    unread: list[str] = getattr(split, "unread", [])  # only files of one's own are of any format
    return unread


def labels_note(dataset: ImageDataset) -> str | None:
    """Says where a data set that looked for labels by itself found them, or that there are none; else None."""
    note: str | None = getattr(dataset, "labels_note", None)
    return note


def of_size(config: ComponentConfig, image_size: int) -> ComponentConfig:
    """Returns the config with images of `image_size` pixels, or the config itself if its images have one size."""
    if "image_size" not in type(config).model_fields:
        return config
    written = {name: getattr(config, name) for name in config.model_fields_set} | {"image_size": image_size}
    return type(config).model_validate(written)


def hold_out(dataset: ImageDataset, fraction: float, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """Splits off a `fraction` of a data set, stratified by label where there are labels.

    Returns the rest and the part. The draw has a seed of its own, which has nothing to do with a run's.
    """
    labels = np.array([dataset.label(row) for row in range(len(dataset))])
    random = np.random.default_rng((seed, 0x5EED))
    part: list[int] = []
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        part += rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)].tolist()
    if not part or len(part) == len(labels):
        raise DataError(
            f"dataset {dataset.name}: a fraction of {fraction} of its {len(labels)} images cannot be held out"
        )
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[part] = True
    return Subset(dataset, np.flatnonzero(~chosen)), Subset(dataset, np.flatnonzero(chosen))


class Subset:
    """Some rows of a data set, renumbered from 0."""

    def __init__(self, dataset: ImageDataset, rows: npt.NDArray[np.int64]) -> None:
        self._dataset, self._rows = dataset, rows
        self.name, self.class_names = dataset.name, dataset.class_names
        self.image_size, self.skipped = dataset.image_size, dataset.skipped
        self.unread = unread_of(dataset)
        self.labels_note = labels_note(dataset)

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, row: int) -> UInt8Array:
        """See ImageDataset."""
        return self._dataset.image(int(self._rows[row]))

    @property
    def pixels(self) -> Callable[[int], UInt8Array]:
        """See ImageDataset; an AttributeError where the whole data set has none."""
        whole = self._dataset.pixels  # type: ignore[attr-defined]
        return lambda row: whole(int(self._rows[row]))

    def label(self, row: int) -> int:
        """See ImageDataset."""
        return self._dataset.label(int(self._rows[row]))

    def stored(self, row: int) -> StoredImage:
        """See ImageDataset."""
        return self._dataset.stored(int(self._rows[row]))

    def source_id(self, row: int) -> bytes:
        """See ImageDataset."""
        return self._dataset.source_id(int(self._rows[row]))


def dataset_digest(dataset: ImageDataset) -> str:
    """Returns 32 hex digits that tell data sets apart."""
    data = hashlib.blake2b(digest_size=16)
    for row in digested_rows(dataset):
        data.update(dataset.source_id(row))
    return data.hexdigest()


def digested_rows(dataset: ImageDataset) -> range:
    """Returns the rows that `dataset_digest` reads."""
    # A digest of every image would read all of ImageNet once more; evenly spaced ones serve as well.
    return range(0, len(dataset), max(1, len(dataset) // DIGESTED))
