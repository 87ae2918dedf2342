"""Corruptions: each changes the image, more so with severity, by draws that belong to the image."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from genssl.evaluators.probes import corruption_operations as operations
from genssl.evaluators.probes.corruptions import CORRUPTIONS, FAMILIES, SEVERITIES, corrupt, strength

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def photos() -> dict[int, np.ndarray]:
    """Crops of two photographs, scaled to each size; uint8 [N, 3, S, S]."""

    def crops(size: int, count: int) -> np.ndarray:
        found = []
        for photo in load_sample_images().images:
            side = min(photo.shape[:2]) // 2
            for number in range(count):
                random = np.random.default_rng(number)
                top, left = random.integers(0, photo.shape[0] - side), random.integers(0, photo.shape[1] - side)
                crop = Image.fromarray(photo[top : top + side, left : left + side])
                found.append(np.asarray(crop.resize((size, size), Image.Resampling.BOX)).transpose(2, 0, 1))
        return np.stack(found)

    return {32: crops(32, 6), 64: crops(64, 4), 224: crops(224, 1)}


@pytest.fixture(scope="module")
def digits(digits_test) -> np.ndarray:
    return np.stack([digits_test.image(row) for row in range(24)])


def squared_differences(images: np.ndarray, name: str) -> list[float]:
    return [((corrupt(images, name, severity).astype(float) - images) ** 2).mean() for severity in SEVERITIES]


def test_the_families_are_those_of_the_paper():
    assert list(FAMILIES) == ["noise", "blur", "weather", "digital"]
    assert len(set(CORRUPTIONS)) == 15
    assert all(getattr(operations, name).__doc__ for name in CORRUPTIONS)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_severity_is_stronger_than_the_one_before(photos, name, size):
    images = photos[size]
    differences = squared_differences(images, name)
    assert differences[0] > 0
    assert all(after > before for before, after in pairwise(differences)), differences
    corrupted = corrupt(images, name, 3)
    assert corrupted.shape == images.shape
    assert corrupted.dtype == np.uint8
    assert all((one != other).any() for one, other in zip(images, corrupted, strict=True))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_so_it_is_for_the_smallest_images(digits, name):
    differences = squared_differences(digits, name)
    assert differences[0] > 0
    assert all(after > before for before, after in pairwise(differences)), differences


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_draw_is_the_images_whatever_the_batch(photos, name):
    images = photos[32]
    whole = corrupt(images, name, 4, seed=5)
    assert np.array_equal(whole, corrupt(images, name, 4, seed=5))
    assert np.array_equal(whole[3:4], corrupt(images[3:4], name, 4, seed=5))
    assert np.array_equal(whole[::-1], corrupt(images[::-1].copy(), name, 4, seed=5))


def test_another_seed_is_another_draw_and_two_images_have_two(photos):
    images = photos[32]
    grey = np.stack([np.full((3, 32, 32), value, np.uint8) for value in (128, 129)])
    for name in ("gaussian_noise", "impulse_noise", "glass_blur", "snow", "frost", "fog", "elastic_transform"):
        assert (corrupt(images, name, 3, seed=0) != corrupt(images, name, 3, seed=1)).any(), name
    noise = corrupt(grey, "gaussian_noise", 5).astype(float) - grey
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_are_taken(name, value):
    flat = np.full((1, 3, 12, 12), value, np.uint8)
    assert corrupt(flat, name, 5).dtype == np.uint8


def test_strengths_are_the_papers_at_its_two_sizes_and_between_them_in_between():
    assert strength("gaussian_noise", 5, 224) == pytest.approx([0.38])
    assert strength("gaussian_noise", 5, 32) == pytest.approx([0.10])
    assert strength("gaussian_noise", 5, 8) == pytest.approx([0.10])
    assert strength("gaussian_noise", 5, 512) == pytest.approx([0.38])
    middle = round(math.sqrt(32 * 224))
    assert strength("gaussian_noise", 5, middle) == pytest.approx([math.sqrt(0.38 * 0.10)], rel=0.01)
    assert strength("defocus_blur", 2, 56) == pytest.approx([1.0])  # lengths are in parts of the image


def test_noises_have_the_moments_that_they_say():
    grey = np.full((3, 100, 100), 0.5)
    assert operations.gaussian_noise(grey, RANDOM, np.array([0.1])).std() == pytest.approx(0.1, rel=0.03)
    shots = operations.shot_noise(grey, RANDOM, np.array([12.0]))
    assert shots.mean() == pytest.approx(0.5, rel=0.02)
    assert shots.var() == pytest.approx(0.5 / 12, rel=0.05)  # Poisson: variance of the count is its mean
    impulses = operations.impulse_noise(grey, RANDOM, np.array([0.27]))
    assert (impulses == 0).mean() == pytest.approx(0.135, abs=0.01)
    assert (impulses == 1).mean() == pytest.approx(0.135, abs=0.01)


def test_blurs_leave_a_constant_and_their_kernels_have_the_width_that_they_say():
    flat = np.full((3, 20, 20), 0.3)
    for name, parameters in (
        ("defocus_blur", [2.5]),
        ("glass_blur", [0.8, 1.5]),
        ("motion_blur", [5.0, 2.0]),
        ("zoom_blur", [0.2]),
        ("elastic_transform", [1.0]),
        ("pixelate", [0.4]),
        ("contrast", [0.3]),
    ):
        assert getattr(operations, name)(flat, RANDOM, np.array(parameters)) == pytest.approx(flat), name
    point = np.zeros((1, 41, 41))
    point[0, 20, 20] = 1
    at = np.arange(41) - 20
    disc = operations.defocus_blur(point, RANDOM, np.array([6.0]))[0]
    assert disc.sum() == pytest.approx(1)
    # A disc has the variance r^2 / 4 in each direction, and linear interpolation adds at most a quarter.
    assert 9.0 * 0.97 < (disc.sum(axis=0) * at**2).sum() < 9.25 * 1.03
    motion = operations.motion_blur(point, RANDOM, np.array([8.0, 3.0]))[0]
    assert motion.sum() == pytest.approx(1)
    along = np.linspace(0, 8, 10000)
    weights = np.exp(-(along**2) / 18)
    length = math.hypot((motion.sum(axis=1) * at).sum(), (motion.sum(axis=0) * at).sum())
    assert length == pytest.approx((along * weights).sum() / weights.sum(), rel=0.05)


def test_brightness_and_contrast_equal_their_formulas():
    import colorsys

    image = np.random.default_rng(2).random((3, 4, 4))
    image[:, 0, 0] = 0
    brighter = operations.brightness(image, RANDOM, np.array([0.3]))
    for row in range(4):
        for column in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, row, column])
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
            assert brighter[:, row, column] == pytest.approx(expected)
    flatter = operations.contrast(image, RANDOM, np.array([0.4]))
    assert flatter.mean(axis=(1, 2)) == pytest.approx(image.mean(axis=(1, 2)))
    assert flatter.std() < image.std()


def test_pixelate_at_half_averages_squares_of_four():
    image = np.random.default_rng(3).random((3, 6, 6))
    cells = image.reshape(3, 3, 2, 3, 2).mean(axis=(2, 4))
    assert operations.pixelate(image, RANDOM, np.array([0.5])) == pytest.approx(cells.repeat(2, 1).repeat(2, 2))
