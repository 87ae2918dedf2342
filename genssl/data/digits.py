"""The 1,797 digits of scikit-learn (UCI optical recognition of handwritten digits): real scans, 8x8, no download."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from genssl.data.base import Split
from genssl.data.configs import DigitsConfig
from genssl.data.files import ArrayDataset

SPLIT_SEED = 0
TEST_SIZE = 360


class Digits(ArrayDataset):
    """A fixed stratified split: 1,437 train and 360 test images, grey, 8x8, values 0..16 stretched to 0..255."""

    def __init__(self, config: DigitsConfig, split: Split) -> None:
        bunch = load_digits()
        rows = np.arange(len(bunch.target))
        train, test = train_test_split(rows, test_size=TEST_SIZE, random_state=SPLIT_SEED, stratify=bunch.target)
        rows = np.sort(train if split == "train" else test)
        pixels = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)[:, None]
        super().__init__(config.name, 8, pixels, bunch.target[rows], [str(digit) for digit in bunch.target_names])
