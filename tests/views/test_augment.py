"""Parameters are drawn per sample, follow the documented distributions, and are applied as torchvision applies them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from genssl.base.devices import stream
from genssl.config.views import AugmentationConfig
from genssl.views import operations
from genssl.views.augment import Augment, Draws, draw_crops
from genssl.views.operations import gaussian_blur, resized_crop, to_grey

ONE_GREY_LEVEL = 1 / 255
STILL = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
}


def test_boxes_lie_inside_and_follow_scale_and_ratio():
    config = AugmentationConfig(crop_scale=(0.2, 0.6), crop_ratio=(0.8, 1.25))
    draws = draw_crops(20_000, 32, config, torch.Generator().manual_seed(0))
    top, left, height, width = torch.from_numpy(draws.boxes(64, 96)).unbind(1)
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
    assert draw_crops(1, 8, config, torch.Generator().manual_seed(0)).boxes(10, 30).tolist() == [[0, 10, 10, 10]]


def test_samples_of_a_batch_get_their_own_parameters():
    one = torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(3))
    views = Augment(AugmentationConfig(), 16)(one.expand(64, 3, 16, 16), stream("x"))
    assert len({view.numpy().tobytes() for view in views}) == 64


def test_probabilities_are_kept():
    images = torch.rand((4000, 3, 8, 8), generator=torch.Generator().manual_seed(4))
    grey = Augment(AugmentationConfig(**STILL | {"grayscale_probability": 0.2}), 8)(images, stream("p"))
    changed = (grey - images).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert float(changed.float().mean()) == pytest.approx(0.2, abs=0.02)
    none = Augment(AugmentationConfig(**STILL), 8)(images, stream("p"))
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


def photographs(count: int, size: int = 24) -> torch.Tensor:
    """Smooth colours float [count, 3, size, size]."""
    coarse = torch.rand((count, 3, 5, 5), generator=torch.Generator().manual_seed(8))
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def by_torchvision(image: torch.Tensor, draws: Draws, row: int, size: int, radius: int, threshold: float):
    """The reference path: one image [3, H, W] through torchvision's functions, with the parameters of its row."""
    view = tv.resized_crop(image, *draws.boxes[row].tolist(), size=[size, size], antialias=False)
    if draws.flip[row]:
        view = tv.horizontal_flip(view)
    if draws.jitter[row]:
        functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
        for operation in draws.order[row].tolist():
            view = functions[operation](view, float(draws.factors[row, operation]))
    if draws.grey[row]:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    if draws.blur[row]:
        view = tv.gaussian_blur(view, kernel_size=[2 * radius + 1] * 2, sigma=[float(draws.sigma[row])] * 2)
    return tv.solarize(view, threshold) if draws.solarize[row] else view


@pytest.mark.parametrize(
    "config",
    [
        AugmentationConfig(),
        AugmentationConfig(preset="moco", solarize_probability=0.5, solarize_threshold=0.4),
        AugmentationConfig(preset="weak", blur_probability=1.0),
    ],
    ids=["simclr", "moco, solarized", "weak, blurred"],
)
def test_a_batch_is_what_torchvision_makes_of_each_sample(config):
    images, augment = photographs(64), Augment(config, 20)
    views = augment(images, stream("reference"))
    draws = augment.draw(64, 24, 24, stream("reference"))
    expected = [
        by_torchvision(image, draws, row, 20, augment.blur_radius, config.solarize_threshold)
        for row, image in enumerate(images)
    ]
    assert float((views - torch.stack(expected)).abs().max()) <= ONE_GREY_LEVEL


def test_parameters_follow_the_documented_distributions():
    config = AugmentationConfig(hue=0.3, contrast=1.5, blur_probability=0.3, solarize_probability=0.2)
    draws = Augment(config, 32).draw(20_000, 32, 32, stream("distributions"))
    for chosen, probability in (
        (draws.flip, 0.5),
        (draws.jitter, 0.8),
        (draws.grey, 0.2),
        (draws.blur, 0.3),
        (draws.solarize, 0.2),
    ):
        assert float(chosen.float().mean()) == pytest.approx(probability, abs=0.015)
    ranges = ((0.2, 1.8), (0.0, 2.5), (0.2, 1.8), (-0.3, 0.3))
    for values, (low, high) in [*zip(draws.factors.T, ranges, strict=True), (draws.sigma, (0.1, 2.0))]:
        quarters = torch.quantile(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        assert quarters.numpy() == pytest.approx(np.linspace(low, high, 5), abs=0.03 * (high - low))
    _, counts = torch.unique(draws.order, dim=0, return_counts=True)
    assert len(counts) == 24
    assert int(counts.min()) > 700  # of 833 expected
    together = torch.stack([draws.flip, draws.jitter, draws.grey, draws.blur, draws.solarize]).float()
    correlations = torch.corrcoef(torch.cat([together, draws.factors.T, draws.sigma[None]]))
    assert float((correlations - torch.eye(len(correlations))).abs().max()) < 0.04, "they are independent"


def test_solarization_changes_no_other_draw():
    plain, solarized = (
        Augment(AugmentationConfig(solarize_probability=probability), 24).draw(50, 24, 24, stream("last"))
        for probability in (0.0, 0.5)
    )
    assert not plain.solarize.any()
    assert 0 < int(solarized.solarize.sum()) < 50
    for name in ("boxes", "flip", "jitter", "order", "factors", "grey", "sigma", "blur"):
        assert torch.equal(getattr(plain, name), getattr(solarized, name))


def test_a_part_of_the_draws_makes_a_part_of_the_views():
    images, augment = photographs(12), Augment(AugmentationConfig(solarize_probability=0.5), 24)
    draws = augment.draw(12, 24, 24, stream("part"))
    rows = torch.tensor([7, 0, 3])
    assert torch.allclose(augment.apply(images[rows], draws.of(rows)), augment.apply(images, draws)[rows], atol=1e-5)


def first_light(images: torch.Tensor, config: AugmentationConfig, size: int, generator: torch.Generator):
    """The augmentation of the first version, draw by draw; views of old recipes must stay what they were."""
    batch = len(images)

    def uniform(low, high):
        return torch.empty(batch).uniform_(low, high, generator=generator)

    def chosen(probability):
        return torch.rand(batch, generator=generator) < probability

    def where(x, mask, operation):
        rows = mask.nonzero()[:, 0]
        return x if len(rows) == 0 else x.index_copy(0, rows, operation(x[rows], rows))

    boxes = torch.from_numpy(draw_crops(batch, 32, config, generator).boxes(*images.shape[2:]))
    x = resized_crop(images, boxes, chosen(config.flip_probability), size)
    jittered = chosen(config.jitter_probability)
    order = torch.rand((batch, 4), generator=generator).argsort(dim=1)
    strengths = (config.brightness, config.contrast, config.saturation)
    factors = [uniform(max(0.0, 1 - s), 1 + s) for s in strengths] + [uniform(-config.hue, config.hue)]
    functions = [getattr(operations, f"adjust_{name}") for name in ("brightness", "contrast", "saturation", "hue")]
    for position in range(4):
        for i, function in enumerate(functions):
            now = jittered & (order[:, position] == i)
            x = where(x, now, lambda part, rows, i=i, function=function: function(part, factors[i][rows]))
    x = where(x, chosen(config.grayscale_probability), lambda part, rows: to_grey(part).expand_as(part))
    sigma = uniform(*config.blur_sigma)
    radius = min(max(1, round(0.1 * size / 2)), size - 1)
    return where(x, chosen(config.blur_probability), lambda part, rows: gaussian_blur(part, sigma[rows], radius))


@pytest.mark.parametrize("size", [8, 24, 96])
def test_views_are_bit_for_bit_those_of_the_first_version(size):
    images = photographs(32)
    ours = Augment(AugmentationConfig(), size)(images, stream("pin"))
    assert torch.equal(ours, first_light(images, AugmentationConfig(), size, stream("pin")))


def test_draws_are_those_that_were_recorded():
    draws = Augment(AugmentationConfig(), 24).draw(64, 24, 24, stream("pin"))
    parts = [draws.boxes, draws.flip, draws.jitter, draws.order, (draws.factors * 1e4).round().long(), draws.grey]
    parts += [(draws.sigma * 1e4).round().long(), draws.blur]
    digest = hashlib.blake2b(b"".join(part.long().contiguous().numpy().tobytes() for part in parts), digest_size=12)
    assert digest.hexdigest() == "470065d8c15b6da43dac0a7c"
