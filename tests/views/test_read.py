"""Augmented views of rows: of arrays as `Augment` makes them, of files cropped from the whole image."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from genssl.base.devices import stream
from genssl.config.views import AugmentationConfig
from genssl.data.configs import FolderConfig
from genssl.data.crops import cut
from genssl.data.folder import ImageFolder
from genssl.views import read
from genssl.views.augment import Augment, draw_crops
from genssl.views.read import augmented

CPU = torch.device("cpu")
ROWS = [5, 2, 7]


def test_rows_of_an_array_set_are_views_of_its_images(digits_train):
    augment = Augment(AugmentationConfig(), 8)
    images = torch.from_numpy(np.stack([digits_train.image(row) for row in ROWS])).float() / 255
    expected = augment(images, stream("views"))
    assert torch.equal(augmented(digits_train, ROWS, augment, stream("views"), CPU), expected)


def test_rows_of_files_are_cropped_from_the_whole_image(tmp_path):
    """The left half is red: a centre square of these pictures would show no red at all."""
    (tmp_path / "a").mkdir()
    for number in range(12):
        pixels = np.full((20, 120, 3), number, np.uint8)
        pixels[:, :45, 0] = 255
        Image.fromarray(pixels).save(tmp_path / "a" / f"{number:02}.png")
    folder = ImageFolder(FolderConfig(root=tmp_path, image_size=16, test_fraction=0.01), "train")
    assert folder.image(0)[0].max() < 12
    augment = Augment(AugmentationConfig(preset="crop_only"), 16)
    rows = list(range(len(folder)))
    views = augmented(folder, rows, augment, stream("views"), CPU)
    assert views.shape == (len(rows), 3, 16, 16)
    assert 0 < sum(float(view[0].max()) == pytest.approx(1, abs=1e-6) for view in views) < len(rows)
    draws = draw_crops(len(rows), 16, augment.config, stream("views"))
    crops = [cut(folder.pixels(row), [draws.of(slice(row, row + 1))])[0] for row in rows]
    assert torch.equal(views, torch.from_numpy(np.stack(crops)).float() / 255)


def test_files_are_decoded_side_by_side(tmp_path, monkeypatch):
    """Two threads meet inside the decoder, which they could not one after the other."""
    (tmp_path / "a").mkdir()
    for number in range(4):
        Image.fromarray(np.full((20, 24, 3), number, np.uint8)).save(tmp_path / "a" / f"{number}.png")
    folder = ImageFolder(FolderConfig(root=tmp_path, image_size=16, test_fraction=0.01), "train")
    rows, augment = [0, 1], Augment(AugmentationConfig(preset="crop_only"), 16)
    expected = augmented(folder, rows, augment, stream("views"), CPU)
    met, pixels = threading.Barrier(2), folder.pixels

    def slow(row: int):
        met.wait(timeout=20)
        return pixels(row)

    monkeypatch.setattr(read, "usable_cores", lambda: 2)
    monkeypatch.setattr(folder, "pixels", slow)
    assert torch.equal(augmented(folder, rows, augment, stream("views"), CPU), expected)
