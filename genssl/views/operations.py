"""The standard SSL augmentations of a whole batch on its device, with the parameters of each sample as tensors.

torchvision's transforms draw one set of parameters for a batch tensor (pytorch/vision#8484), which is wrong for SSL
views. Each function here takes one entry a sample, so that it can be compared with torchvision's functional result
sample by sample; `augment.Augment` draws them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision and Pillow use


def resized_crop(images: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts a box out of each image float [B, C, H, W] and resizes it to float [B, C, size, size], mirrored where told.

    Boxes are int [B, 4], (top, left, height, width) in pixels, inside the image; flip is bool [B]. Bilinear, not
    antialiased.
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


def solarize(images: torch.Tensor, threshold: float) -> torch.Tensor:
    """Inverts the values of images float [B, C, H, W] in [0, 1] that are `threshold` or more."""
    return torch.where(images >= threshold, 1 - images, images)
