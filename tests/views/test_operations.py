"""Batched augmentations equal torchvision's functional results for the same parameters, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from genssl.config.views import AugmentationConfig
from genssl.views.augment import draw_crops
from genssl.views.operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    resized_crop,
    solarize,
    to_grey,
)

BATCH, SIZE = 16, 24
ONE_GREY_LEVEL = 1 / 255


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    smooth = torch.rand((BATCH, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(smooth, size=(SIZE, SIZE + 8), mode="bilinear")
    images[0] = 0.5  # grey: no hue, no saturation
    images[1] = 0.0
    images[2, 0] = 1.0
    return images


def farthest(ours: torch.Tensor, theirs: list[torch.Tensor]) -> float:
    return float((ours - torch.stack(theirs)).abs().max())


def test_resized_crop_equals_torchvisions(images):
    generator = torch.Generator().manual_seed(1)
    draws = draw_crops(BATCH, SIZE, AugmentationConfig(crop_scale=(0.05, 1.0)), generator)
    boxes = torch.from_numpy(draws.boxes(SIZE, SIZE + 8))
    flip = torch.arange(BATCH) % 2 == 0
    ours = resized_crop(images, boxes, flip, 20)
    theirs = []
    for image, box, mirrored in zip(images, boxes.tolist(), flip, strict=True):
        view = tv.resized_crop(image, *box, size=[20, 20], antialias=False)
        theirs.append(tv.horizontal_flip(view) if mirrored else view)
    assert farthest(ours, theirs) <= ONE_GREY_LEVEL


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, tv.adjust_brightness, 0.0, 2.0),
        (adjust_contrast, tv.adjust_contrast, 0.0, 2.0),
        (adjust_saturation, tv.adjust_saturation, 0.0, 2.0),
        (adjust_hue, tv.adjust_hue, -0.5, 0.5),
    ],
)
def test_colour_operations_equal_torchvisions(images, ours, theirs, low, high):
    factors = torch.linspace(low, high, BATCH)
    expected = [theirs(image, float(factor)) for image, factor in zip(images, factors, strict=True)]
    assert farthest(ours(images, factors), expected) <= ONE_GREY_LEVEL


def test_grey_equals_torchvisions(images):
    assert farthest(to_grey(images), [tv.rgb_to_grayscale(image) for image in images]) <= ONE_GREY_LEVEL


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_blur_equals_torchvisions(images, radius):
    sigma = torch.linspace(0.1, 2.0, BATCH)
    expected = [
        tv.gaussian_blur(image, kernel_size=[2 * radius + 1] * 2, sigma=[float(s)] * 2)
        for image, s in zip(images, sigma, strict=True)
    ]
    assert farthest(gaussian_blur(images, sigma, radius), expected) <= ONE_GREY_LEVEL


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_solarize_equals_torchvisions(images, threshold):
    expected = [tv.solarize(image, threshold) for image in images]
    assert farthest(solarize(images, threshold), expected) <= ONE_GREY_LEVEL
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    ours = (solarize(levels.expand(1, 3, 16, 16) / 255, 0.5) * 255).round().byte()
    assert torch.equal(ours[0, :1], tv.solarize(levels[0], 128)), "0.5 is Pillow's default of 128 grey levels"
