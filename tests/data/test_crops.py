"""Crops of whole images: the boxes of torchvision's rule, cut out as torchvision cuts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from genssl.base.devices import stream
from genssl.config.views import AugmentationConfig, CropsConfig, ViewsConfig
from genssl.data.configs import DigitsConfig, FolderConfig
from genssl.data.crops import cut
from genssl.data.folder import ImageFolder
from genssl.data.load import hold_out, load_dataset
from genssl.training.loader import SourceLoader
from genssl.variants.plan import StepPlan
from genssl.variants.source import REAL, Delivery
from genssl.views.augment import draw_crops
from genssl.views.augmentations import Augmentations
from genssl.views.compose import Crops, compose_views

SIZES = [(40, 90), (300, 200), (64, 64), (31, 500)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> ImageFolder:
    """Smooth pictures of several sizes, in the order of SIZES."""
    root = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    test_root = tmp_path_factory.mktemp("test")
    Image.new("RGB", (8, 8)).save(test_root / "black.png")
    for number, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(draws.integers(0, 256, (5, 7, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(root / f"{number}.png")
    return ImageFolder(FolderConfig(root=root, test_root=test_root, image_size=24, labels="none"), "train")


def test_boxes_depend_on_the_draws_and_the_size_of_the_image_alone():
    draws = draw_crops(4, 24, AugmentationConfig(crop_scale=(0.2, 0.9)), stream("boxes"))
    heights, widths = (np.array(sides) for sides in zip(*SIZES, strict=True))
    together = draws.boxes(heights, widths)
    for row, (height, width) in enumerate(SIZES):
        assert draws.of(slice(row, row + 1)).boxes(height, width)[0].tolist() == together[row].tolist()
        top, left, h, w = together[row]
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        if (height, width) != (31, 500):  # into which few boxes fit
            assert 0.19 < h * w / (height * width) < 0.91


def test_crops_are_torchvisions(pictures):
    draws = [draw_crops(4, size, AugmentationConfig(), stream("cut", size)) for size in (24, 10)]
    for row in range(len(SIZES)):
        pixels = pictures.pixels(row)
        mine = [one.of(slice(row, row + 1)) for one in draws]
        for one, crop in zip(mine, cut(pixels, mine), strict=True):
            box = one.boxes(*pixels.shape[1:])[0].tolist()
            expected = tv.resized_crop(
                Image.fromarray(pixels.transpose(1, 2, 0)), *box, [one.size] * 2, InterpolationMode.BILINEAR
            )
            difference = np.abs(crop.astype(int) - np.asarray(expected).transpose(2, 0, 1))
            assert difference.max() <= 1


def step(indices: list[list[int]]) -> StepPlan:
    return StepPlan(epoch=1, step=2, rows=np.arange(4), indices=np.array(indices))


@pytest.mark.parametrize("policy", ["second", "third", "added"])
def test_views_are_crops_of_whole_images_and_of_variants(pictures, policy):
    """Every view of a source shows its own crop, those of variants the variant, wherever and however late it came."""
    columns = {"second": 2, "third": 3, "added": 1}[policy]
    indices = [[REAL] * columns for _ in range(4)]
    indices[1][-1], indices[2][-1] = 7, 8  # the variant of row 2 comes too late
    plan = step(indices)
    crops = CropsConfig(count=2, size=8, augmentation="none")
    config = ViewsConfig(policy=policy, augmentation="crop_only", generated_augmentation="none", crops=crops)
    augmentations = Augmentations(config, 24)
    loader = SourceLoader(pictures, lambda plan: augmentations.crop_draws(plan, 3), threads=2, ahead=0)
    ((_, sources),) = loader.batches(iter([plan]))
    loader.close()
    assert isinstance(sources, Crops)
    delivery = Delivery(np.full((1, 3, 24, 24), 200, np.uint8), ["generated", "real"], [7, REAL])
    views = compose_views(plan, sources, delivery, augmentations, 3, CPU)
    seen = [*views.pair, *views.generated, *views.crops]
    assert len(seen) == len(sources.images)
    for number, (view, own) in enumerate(zip(seen, sources.images, strict=True)):
        shows_variant = policy == "added" or number == columns - 1
        for row in range(4):
            if row == 1 and shows_variant:
                assert torch.allclose(view[row], torch.tensor(200 / 255), atol=1e-6)
            else:
                assert torch.equal(view[row], own[row].float() / 255)
        draws = augmentations.crop_draws(plan, 3)[number]
        expected = [cut(pictures.pixels(row), [draws.of(slice(row, row + 1))])[0] for row in range(4)]
        assert np.array_equal(own.numpy(), np.stack(expected))


def test_mirrored_and_coloured_as_any_other_view(pictures):
    """What follows the crop is what follows it on the device, with the same draws."""
    augmentations = Augmentations(ViewsConfig(policy="none", augmentation="simclr"), 24)
    plan = step([[REAL, REAL]] * 4)
    draws = augmentations.crop_draws(plan, 3)
    own = [cut(pictures.pixels(row), [one.of(slice(row, row + 1)) for one in draws]) for row in range(4)]
    images = tuple(torch.from_numpy(np.stack(crop)) for crop in zip(*own, strict=True))
    views = compose_views(plan, Crops(images), None, augmentations, 3, CPU).pair
    whole = Augmentations(
        ViewsConfig(policy="none", augmentation={"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}), 24
    )
    for number, (view, crop) in enumerate(zip(views, images, strict=True)):
        # A crop of the whole image takes as many draws, and leaves the rest of them where they were.
        expected = whole.view(number, crop.float() / 255, torch.zeros(4, dtype=torch.bool), plan, 3)
        assert torch.allclose(view, expected, atol=1e-5)


def test_ranks_cut_what_one_process_cuts(pictures):
    augmentations = Augmentations(ViewsConfig(policy="none"), 24)
    whole = step([[REAL, REAL]] * 4)
    part = StepPlan(epoch=1, step=2, rows=whole.rows[2:], indices=whole.indices[2:], start=2, batch_size=4)
    for one, other in zip(augmentations.crop_draws(whole, 3), augmentations.crop_draws(part, 3), strict=True):
        assert np.array_equal(one.areas[2:], other.areas)
        assert np.array_equal(one.positions[2:], other.positions)


def test_parts_of_a_data_set_have_what_the_whole_has(pictures):
    rest, part = hold_out(pictures, 0.5)
    assert sorted(data.pixels(row).shape[1:] for data in (rest, part) for row in range(len(data))) == sorted(SIZES)  # type: ignore[attr-defined]
    rest, _ = hold_out(load_dataset(DigitsConfig(), "train"), 0.5)
    assert not hasattr(rest, "pixels")
