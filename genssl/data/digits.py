"""The 1,797 digits of scikit-learn (UCI optical recognition of handwritten digits): real scans, 8x8, no download."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from genssl.data.base import Split, StoredImage, UInt8Array, raw_image
from genssl.data.configs import DigitsConfig

SPLIT_SEED = 0
TEST_SIZE = 360


class Digits:
    """A fixed stratified split: 1,437 train and 360 test images, grey, 8x8, values 0..16 stretched to 0..255."""

    def __init__(self, config: DigitsConfig, split: Split) -> None:
        bunch = load_digits()
        rows = np.arange(len(bunch.target))
        train, test = train_test_split(rows, test_size=TEST_SIZE, random_state=SPLIT_SEED, stratify=bunch.target)
        rows = np.sort(train if split == "train" else test)
        self.name = config.name
        self.class_names: list[str] | None = [str(digit) for digit in bunch.target_names]
        self.image_size = 8
        self.skipped: list[str] = []
        self._labels = bunch.target[rows].astype(int)
        pixels = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
        self._stored = [raw_image(image[None]) for image in pixels]
        self._images = np.repeat(pixels[:, None], 3, axis=1)
        self._source_ids = [stored.source_id for stored in self._stored]

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, row: int) -> UInt8Array:
        """Returns the digit [3, 8, 8], the grey value in each channel."""
        image: UInt8Array = self._images[row]
        return image

    def label(self, row: int) -> int:
        """Returns the digit, 0 to 9."""
        return int(self._labels[row])

    def stored(self, row: int) -> StoredImage:
        """Returns the digit as a raw image [1, 8, 8]."""
        return self._stored[row]

    def source_id(self, row: int) -> bytes:
        """Returns the 16-byte name of the digit."""
        return self._source_ids[row]
