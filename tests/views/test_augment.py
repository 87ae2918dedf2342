"""Batched augmentations equal torchvision's functional results for the same parameters, sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from genssl.config.recipe import AugmentationConfig
from genssl.runtime import stream
from genssl.views.augment import (
    Augment,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    draw_boxes,
    gaussian_blur,
    resized_crop,
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
    boxes = draw_boxes(BATCH, SIZE, SIZE + 8, AugmentationConfig(crop_scale=(0.05, 1.0)), generator)
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


def test_boxes_lie_inside_and_follow_scale_and_ratio():
    config = AugmentationConfig(crop_scale=(0.2, 0.6), crop_ratio=(0.8, 1.25))
    top, left, height, width = draw_boxes(20_000, 64, 96, config, torch.Generator().manual_seed(0)).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 64).all()
    assert (left + width <= 96).all()
    area = (height * width) / (64 * 96)
    assert area.min() > 0.19
    assert area.max() < 0.62
    assert float(area.mean()) == pytest.approx(0.4, abs=0.01)
    log_ratio = (width / height).log()
    assert float(log_ratio.abs().max()) < np.log(1.25) + 0.05
    assert float(log_ratio.mean()) == pytest.approx(0, abs=0.01)
    for position, room in ((top, 64 - height), (left, 96 - width)):
        free = room > 0
        assert float((position[free] / room[free]).mean()) == pytest.approx(0.5, abs=0.02)


def test_boxes_that_cannot_fit_become_the_largest_centred_one():
    config = AugmentationConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert draw_boxes(1, 10, 30, config, torch.Generator().manual_seed(0)).tolist() == [[0, 10, 10, 10]]


def test_samples_of_a_batch_get_their_own_parameters():
    one = torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(3))
    views = Augment(AugmentationConfig(), 16)(one.expand(64, 3, 16, 16), stream("x"))
    assert len({view.numpy().tobytes() for view in views}) == 64


def test_probabilities_are_kept():
    images = torch.rand((4000, 3, 8, 8), generator=torch.Generator().manual_seed(4))
    still = {
        "crop_scale": (1.0, 1.0),
        "crop_ratio": (1.0, 1.0),
        "flip_probability": 0.0,
        "jitter_probability": 0.0,
        "blur_probability": 0.0,
    }
    grey = Augment(AugmentationConfig(**still, grayscale_probability=0.2), 8)(images, stream("p"))
    changed = (grey - images).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert float(changed.float().mean()) == pytest.approx(0.2, abs=0.02)
    none = Augment(AugmentationConfig(**still, grayscale_probability=0.0), 8)(images, stream("p"))
    assert float((none - images).abs().max()) < 1e-5


def test_jitter_uses_every_order():
    images = torch.rand((1, 3, 4, 4), generator=torch.Generator().manual_seed(5)).expand(4000, 3, 4, 4)
    # Brightness 0 and saturation 0 commute with nothing: the order shows in whether colour or light comes first.
    config = AugmentationConfig(
        crop_scale=(1, 1),
        crop_ratio=(1, 1),
        flip_probability=0,
        grayscale_probability=0,
        blur_probability=0,
        jitter_probability=1,
    )
    draws = stream("order")
    views = Augment(config, 4)(images, draws)
    assert len({view.numpy().tobytes() for view in views}) == 4000
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1


def test_equal_streams_give_equal_views():
    images = torch.rand((8, 3, 16, 16), generator=torch.Generator().manual_seed(6))
    augment = Augment(AugmentationConfig(), 16)
    assert torch.equal(augment(images, stream("a", 1)), augment(images, stream("a", 1)))
    assert not torch.equal(augment(images, stream("a", 1)), augment(images, stream("a", 2)))
