"""The standard SSL augmentations for a whole batch on its device, every parameter drawn per sample.

torchvision's transforms draw one set of parameters for a batch tensor (pytorch/vision#8484), which is wrong for SSL
views. Each function here takes the parameters as tensors, one entry a sample, so that it can be compared with
torchvision's functional result sample by sample; `Augment` draws them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from genssl.config.recipe import AugmentationConfig

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision and Pillow use


def resized_crop(images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts a box out of each image, resizes it to a square (bilinear, not antialiased), and mirrors where told.

    Args:
        images: float [B, C, H, W].
        boxes: int [B, 4], (top, left, height, width) in pixels, inside the image.
        flip: bool [B].
        size: side of the result.

    Returns:
        float [B, C, size, size].
    """
    batch, _, height, width = images.shape
    top, left, box_height, box_width = boxes.to(images.dtype).unbind(1)
    centres = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size
    rows = top[:, None] + centres * box_height[:, None] - 0.5
    columns = left[:, None] + torch.where(flip[:, None], 1 - centres, centres) * box_width[:, None] - 0.5
    # Sampling stays inside the box, as if it had been cut out first; else pixels from outside bleed into the border.
    rows = rows.clamp(min=top[:, None], max=(top + box_height - 1)[:, None])
    columns = columns.clamp(min=left[:, None], max=(left + box_width - 1)[:, None])
    y = (2 * rows + 1) / height - 1
    x = (2 * columns + 1) / width - 1
    grid = torch.stack([x[:, None, :].expand(batch, size, size), y[:, :, None].expand(batch, size, size)], dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """Returns the luma of RGB images float [B, 3, H, W] as [B, 1, H, W]."""
    weights = torch.tensor(GREY, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _blend(images: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiplies images float [B, 3, H, W] in [0, 1] by factor [B] >= 0."""
    return (images * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Moves images float [B, 3, H, W] away from (factor > 1) or towards (< 1) their mean luma; factor [B]."""
    return _blend(images, to_grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Moves images float [B, 3, H, W] away from (factor > 1) or towards (< 1) their grey version; factor [B]."""
    return _blend(images, to_grey(images), factor)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turns the hue of images float [B, 3, H, W] in [0, 1] by shift [B] in [-0.5, 0.5] of the colour circle."""
    red, green, blue = images.unbind(1)
    value, _ = images.max(dim=1)
    chroma = value - images.min(dim=1).values
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = torch.where(chroma == 0, torch.zeros_like(hue), hue) / 6
    hue = (hue + shift.view(-1, 1, 1)) % 1.0
    # HSV to RGB without branches: channel n is value - chroma * max(0, min(k, 4 - k, 1)), k = (n + 6 hue) mod 6.
    channels = []
    for n in (5, 3, 1):
        k = (n + 6 * hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """Blurs images float [B, C, H, W] with a Gaussian of standard deviation sigma [B] (pixels), borders reflected.

    Args:
        radius: half the kernel's length; smaller than the image's sides.
    """
    batch, channels, height, width = images.shape
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.to(images.dtype)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    x = F.pad(images, (radius, radius, radius, radius), mode="reflect").reshape(
        1, batch * channels, height + 2 * radius, width + 2 * radius
    )
    x = F.conv2d(x, kernel[:, None, :, None], groups=batch * channels)
    x = F.conv2d(x, kernel[:, None, None, :], groups=batch * channels)
    return x.reshape(batch, channels, height, width)


class Augment:
    """Draws the parameters of every augmentation per sample and applies them.

    Order: resized crop and flip, colour jitter in random order, grey, blur.

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
        """Returns one view of each image.

        Args:
            images: float [B, 3, H, W] in [0, 1].
            generator: a CPU generator; all parameters come from it, so views are the same on every device.

        Returns:
            float [B, 3, size, size] in [0, 1].
        """
        config, batch = self.config, len(images)

        def uniform(low: float, high: float) -> torch.Tensor:
            return torch.empty(batch).uniform_(low, high, generator=generator)

        def chosen(probability: float) -> torch.Tensor:
            return torch.rand(batch, generator=generator) < probability

        boxes = draw_boxes(batch, images.shape[2], images.shape[3], config, generator)
        x = resized_crop(images, boxes.to(images.device), chosen(config.flip_probability).to(images.device), self.size)

        jittered = chosen(config.jitter_probability)
        order = torch.rand((batch, 4), generator=generator).argsort(dim=1)
        strengths = (config.brightness, config.contrast, config.saturation)
        factors = [uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths] + [
            uniform(-config.hue, config.hue)
        ]
        operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        active = [i for i, strength in enumerate((*strengths, config.hue)) if strength > 0]
        for position in range(4):
            for i in active:
                x = _where(
                    x,
                    jittered & (order[:, position] == i),
                    lambda part, rows, i=i: operations[i](part, factors[i][rows].to(part)),
                )
        x = _where(x, chosen(config.grayscale_probability), lambda part, rows: to_grey(part).expand_as(part))
        sigma = uniform(*config.blur_sigma)
        return _where(
            x,
            chosen(config.blur_probability),
            lambda part, rows: gaussian_blur(part, sigma[rows].to(part), self.blur_radius),
        )


def _where(images: torch.Tensor, mask: torch.Tensor, operation) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Applies `operation(part, rows)` to the images that the CPU mask chooses, and returns the batch."""
    rows = mask.nonzero()[:, 0]
    if len(rows) == 0:
        return images
    on_device = rows.to(images.device)
    return images.index_copy(0, on_device, operation(images[on_device], rows))


def draw_boxes(
    batch: int, height: int, width: int, config: AugmentationConfig, generator: torch.Generator
) -> torch.Tensor:
    """Draws crop boxes by torchvision's rule: area and log-ratio uniform, ten tries, else the largest centred box.

    Returns:
        int64 [batch, 4]: top, left, height, width.
    """
    tries = 10
    area = torch.empty((batch, tries)).uniform_(*config.crop_scale, generator=generator) * height * width
    ratio = (
        torch.empty((batch, tries))
        .uniform_(math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1]), generator=generator)
        .exp()
    )
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    in_ratio = width / height
    fallback_w = width if in_ratio <= config.crop_ratio[1] else round(height * config.crop_ratio[1])
    fallback_h = height if in_ratio >= config.crop_ratio[0] else round(width / config.crop_ratio[0])
    any_fits = fits.any(dim=1)
    w, h = torch.where(any_fits, w, fallback_w), torch.where(any_fits, h, fallback_h)
    # torch.randint takes one bound for all rows, so positions come from uniforms.
    u = torch.rand((2, batch), generator=generator)
    random_top, random_left = (u[0] * (height - h + 1)).long(), (u[1] * (width - w + 1)).long()
    top = torch.where(any_fits, random_top, (height - h) // 2)
    left = torch.where(any_fits, random_left, (width - w) // 2)
    return torch.stack([top, left, h, w], dim=1)
