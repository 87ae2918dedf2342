"""How images larger than a server takes are named and sent."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from genssl.client.images import MOST_RAW_BYTES, MOST_RAW_PIXELS, stored_image
from genssl.config.limits import LimitsConfig
from genssl.data.base import StoredImage, raw_image
from genssl.data.decode import resize_and_crop


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """4000 x 3000 pixels: waves from wide to narrow, as photos have."""
    x, y = np.meshgrid(np.arange(4000), np.arange(3000))
    waves = [np.sin(x * x / 40_000) * np.sin(y / 30), np.sin((x + y) / 20), np.sin(y * y / 90_000)]
    return Image.fromarray(np.stack([(127.5 + 100 * wave).astype(np.uint8) for wave in waves], axis=2))


def jpeg(image: Image.Image, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80, **settings)
    return buffer.getvalue()


def test_a_large_image_is_one_source_in_whatever_form_it_comes(photo):
    pixels = np.array(photo)
    stored = stored_image(photo)
    assert (stored.encoding, stored.channels, stored.height, stored.width) == ("raw", 3, 1000, 1333)
    means = pixels[:3, :3].reshape(9, 3).mean(axis=0)
    first = np.frombuffer(stored.data, np.uint8).reshape(3, 1000, 1333)[:, 0, 0]
    assert np.abs(first - means).max() <= 1, "the mean of a block"
    forms = [pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels), photo.copy(), photo.convert("RGBA")]
    assert {stored_image(form).source_id for form in forms} == {stored.source_id}
    assert stored.source_id == raw_image(np.frombuffer(stored.data, np.uint8).reshape(3, 1000, 1333)).source_id


def test_what_fits_keeps_its_bytes_and_its_name():
    fits = np.zeros((2364, 2365, 3), np.uint8)
    assert MOST_RAW_BYTES - 10_000 < fits.nbytes <= MOST_RAW_BYTES
    assert stored_image(fits) == raw_image(fits.transpose(2, 0, 1))
    grey = np.zeros((4000, 4000), np.uint8)
    assert stored_image(grey) == raw_image(grey[None])
    over = np.zeros((4000, 4001), np.uint8)
    assert stored_image(over) == raw_image(np.zeros((1, 800, 800), np.uint8))
    whole = raw_image(over[None])
    assert stored_image(whole) is whole, "a stored image is as its owner wants it"


@pytest.mark.parametrize(
    "size", [(2400, 2400), (4000, 3000), (9000, 6000), (16_100, 1000), (1000, 16_100), (60_000, 300)]
)
def test_what_is_shrunk_fits_a_server_of_default_limits(size):
    limits = LimitsConfig()
    assert (limits.max_image_bytes, limits.max_image_pixels) >= (MOST_RAW_BYTES, MOST_RAW_PIXELS)
    stored = stored_image(Image.new("RGB", size))
    assert len(stored.data) <= limits.max_image_bytes
    assert stored.width * stored.height <= limits.max_image_pixels
    assert min(stored.width, stored.height) >= min(768, min(size) // 2)
    assert stored.width / stored.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_a_conditioner_of_224_pixels_sees_little_difference(photo):
    whole = np.array(photo).transpose(2, 0, 1)
    stored = stored_image(whole)
    shrunk = np.frombuffer(stored.data, np.uint8).reshape(3, stored.height, stored.width)
    apart = np.abs(resize_and_crop(whole, 224).astype(int) - resize_and_crop(shrunk, 224))
    # Grey levels: 1.2 for these waves, whose square is cut out half a pixel beside; 0.8 for pink noise.
    assert apart.mean() < 2.0
    corner = np.abs(resize_and_crop(whole, 224).astype(int) - resize_and_crop(whole[:, ::3, ::3], 224))
    assert apart.mean() < corner.mean(), "nearer than every third pixel would be"


def test_a_large_picture_that_nobody_has_read_is_sent_as_its_file(photo, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(photo))
    file = StoredImage(path.read_bytes(), "file")
    opened = Image.open(path)
    assert stored_image(opened) == stored_image(path) == stored_image(path.read_bytes()) == file
    assert np.array_equal(np.array(opened), np.array(Image.open(path))), "and can be read afterwards"
    assert stored_image(Image.open(io.BytesIO(path.read_bytes()))) == file


def _drawn_on(path: Path) -> Image.Image:
    image = Image.open(path)
    ImageDraw.Draw(image).rectangle((0, 0, 2000, 2000), fill="red")
    return image


def _drafted(path: Path) -> Image.Image:
    image = Image.open(path)
    image.draft("L", image.size)
    return image


def _converted(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


@pytest.mark.parametrize("changed", [_drawn_on, _drafted, _converted])
def test_a_picture_that_is_no_longer_its_file_is_sent_as_its_pixels(photo, tmp_path, changed):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(photo))
    image = changed(path)
    pixels = np.array(changed(path))
    assert stored_image(image) == stored_image(pixels)
    assert stored_image(image).encoding == "raw"


def test_a_picture_that_its_exif_turns_is_sent_as_its_file_or_as_who_changed_it_left_it(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(photo, exif=exif))
    assert stored_image(Image.open(path)) == StoredImage(path.read_bytes(), "file"), "which the server turns"
    for changed in (Image.open(path).convert("RGB"), Image.open(path).transpose(Image.Transpose.ROTATE_270)):
        assert stored_image(changed) == stored_image(np.array(changed))
