"""Draws the parameters of every standard augmentation per sample, and applies them to a batch on its device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from genssl.config.views import AugmentationConfig
from genssl.data.crops import CropDraws
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

Rows = slice | torch.Tensor
COLOUR_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


@dataclass(frozen=True)
class Draws:
    """The parameters of a batch's augmentations, on the CPU; which images get a step, and with what numbers.

    `boxes` int64 [B, 4] are top, left, height and width of the crops; `order` int64 [B, 4] is that of COLOUR_OPERATIONS
    and `factors` float [B, 4] are their parameters; `sigma` float [B] is of the blur, in pixels; the others are bool
    [B].
    """

    boxes: torch.Tensor
    flip: torch.Tensor
    jitter: torch.Tensor
    order: torch.Tensor
    factors: torch.Tensor
    grey: torch.Tensor
    sigma: torch.Tensor
    blur: torch.Tensor
    solarize: torch.Tensor

    def of(self, rows: Rows) -> Draws:
        """Returns the parameters of some rows, given as a slice, a mask or numbers."""
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class Augment:
    """One view's augmentations.

    Order: resized crop and flip, colour jitter in random order, grey, blur, solarization.

    Args:
        config: ranges and probabilities.
        size: side of the views in pixels.
    """

    def __init__(self, config: AugmentationConfig, size: int) -> None:
        self.config = config
        self.size = size
        # SimCLR's kernel is a tenth of the image; at least 3 pixels, so that small images are blurred at all.
        self.blur_radius = min(max(1, round(0.1 * size / 2)), size - 1)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Returns one view float [B, 3, size, size] of each image float [B, 3, H, W], both in [0, 1].

        All parameters come from a CPU generator, so views are the same on every device.
        """
        return self.apply(images, self.draw(len(images), images.shape[2], images.shape[3], generator))

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator) -> Draws:
        """Draws the parameters for `batch` images of a size.

        The draws of a stream are compatible: what is added to this list comes last and only if it is switched on, so
        that views of recipes without it stay what they were.
        """
        config = self.config

        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.empty(batch).uniform_(low, high, generator=generator)

        def chosen(probability: float) -> torch.Tensor:
            return torch.rand(batch, generator=generator) < probability

        boxes = torch.from_numpy(draw_crops(batch, self.size, config, generator).boxes(height, width))
        flip, jitter = chosen(config.flip_probability), chosen(config.jitter_probability)
        order = torch.rand((batch, 4), generator=generator).argsort(dim=1)
        factors = [uniform(max(0.0, 1 - strength), 1 + strength) for strength in self._strengths()[:3]]
        factors.append(uniform(-config.hue, config.hue))
        grey, sigma = chosen(config.grayscale_probability), uniform(*config.blur_sigma)
        blur = chosen(config.blur_probability)
        never = torch.zeros(batch, dtype=torch.bool)
        return Draws(
            boxes=boxes,
            flip=flip,
            jitter=jitter,
            order=order,
            factors=torch.stack(factors, dim=1),
            grey=grey,
            sigma=sigma,
            blur=blur,
            solarize=chosen(config.solarize_probability) if config.solarize_probability > 0 else never,
        )

    def apply(self, images: torch.Tensor, draws: Draws, *, is_cropped: bool = False) -> torch.Tensor:
        """Makes the views that drawn parameters say, float [B, 3, size, size] in [0, 1].

        `images` are float [B, 3, H, W] in [0, 1], or with `is_cropped` the crops already, [B, 3, size, size], for which
        `draws.boxes` is not looked at.
        """
        flip = draws.flip.to(images.device)
        if is_cropped:
            x = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        else:
            x = resized_crop(images, draws.boxes.to(images.device), flip, self.size)
        active = [i for i, strength in enumerate(self._strengths()) if strength > 0]
        for position in range(4):
            for i in active:
                now = draws.jitter & (draws.order[:, position] == i)
                x = _where(x, now, COLOUR_OPERATIONS[i], draws.factors[:, i])
        x = _where(x, draws.grey, lambda part: to_grey(part).expand_as(part))
        x = _where(x, draws.blur, lambda part, sigma: gaussian_blur(part, sigma, self.blur_radius), draws.sigma)
        return _where(x, draws.solarize, lambda part: solarize(part, self.config.solarize_threshold))

    def _strengths(self) -> tuple[float, float, float, float]:
        config = self.config
        return config.brightness, config.contrast, config.saturation, config.hue


def _where(
    images: torch.Tensor, mask: torch.Tensor, operation: Callable[..., torch.Tensor], *parameters: torch.Tensor
) -> torch.Tensor:
    """Applies `operation(part, *parameters of the part)` to the images that the CPU mask chooses; returns the batch."""
    rows = mask.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    on_device = rows.to(images.device)
    part = images[on_device]
    return images.index_copy(0, on_device, operation(part, *(values[rows].to(part) for values in parameters)))


def draw_crops(batch: int, size: int, config: AugmentationConfig, generator: torch.Generator) -> CropDraws:
    """Draws what `batch` crops need, whatever the size of their images: area and log-ratio uniform, ten tries."""
    tries = 10
    areas = torch.empty((batch, tries)).uniform_(*config.crop_scale, generator=generator)
    ratios = (
        torch.empty((batch, tries))
        .uniform_(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1]), generator=generator)
        .exp()
    )
    # torch.randint takes one bound for all rows, so positions come from uniforms.
    positions = torch.rand((2, batch), generator=generator).T
    return CropDraws(areas.numpy(), ratios.numpy(), positions.numpy(), config.crop_ratio, size)
