"""Random resized crops of images at their stored size: where the boxes lie, and cutting them out. Imports no torch.

What is random is drawn before an image is read (`CropDraws`), since only then its size is known; a box is a function of
both. So a view does not depend on who decodes its source, or when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from genssl.data.base import UInt8Array

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CropDraws:
    """What is drawn for one crop of each of N images, of whatever size."""

    areas: FloatArray  # float32 [N, tries], of the box as a fraction of the image
    ratios: FloatArray  # float32 [N, tries], width by height of the box
    positions: FloatArray  # float32 [N, 2] in [0, 1), of the box in the room that it has, down and across
    ratio_bounds: tuple[float, float]  # of `ratios`, for images that no try fits into
    size: int  # side of the crop in pixels after it was resized

    def of(self, rows: slice) -> CropDraws:
        """Returns the draws of some of the images."""
        return CropDraws(self.areas[rows], self.ratios[rows], self.positions[rows], self.ratio_bounds, self.size)

    def boxes(self, heights: int | IntArray, widths: int | IntArray) -> IntArray:
        """Returns the boxes by torchvision's rule: the first try that fits, else the largest centred box.

        Args:
            heights, widths: of the images in pixels, [N] or one for all.

        Returns:
            int64 [N, 4]: top, left, height, width.
        """
        heights = np.broadcast_to(np.asarray(heights, np.int64), len(self.areas))
        widths = np.broadcast_to(np.asarray(widths, np.int64), len(self.areas))
        pixels = self.areas * _float(heights)[:, None] * _float(widths)[:, None]
        w = np.sqrt(pixels * self.ratios).round().astype(np.int64)
        h = np.sqrt(pixels / self.ratios).round().astype(np.int64)
        fits = (w >= 1) & (h >= 1) & (w <= widths[:, None]) & (h <= heights[:, None])
        first = fits.argmax(axis=1)[:, None]
        w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
        low, high = self.ratio_bounds
        in_ratio = widths / heights
        fallback_w = np.where(in_ratio <= high, widths, np.round(heights * high).astype(np.int64))
        fallback_h = np.where(in_ratio >= low, heights, np.round(widths / low).astype(np.int64))
        any_fits = fits.any(axis=1)
        w, h = np.where(any_fits, w, fallback_w), np.where(any_fits, h, fallback_h)
        top = (self.positions[:, 0] * _float(heights - h + 1)).astype(np.int64)
        left = (self.positions[:, 1] * _float(widths - w + 1)).astype(np.int64)
        top = np.where(any_fits, top, (heights - h) // 2)
        left = np.where(any_fits, left, (widths - w) // 2)
        return np.stack([top, left, h, w], axis=1)


def cut(pixels: UInt8Array, draws: Sequence[CropDraws]) -> list[UInt8Array]:
    """Cuts several crops out of one image (Pillow, bilinear, antialiased: torchvision's RandomResizedCrop of a file).

    Args:
        pixels: uint8 [3, H, W].
        draws: of the crops, each for one image.

    Returns:
        uint8 [3, size, size] for each.
    """
    _, height, width = pixels.shape
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    crops = []
    for one in draws:
        top, left, h, w = one.boxes(height, width)[0].tolist()
        # Cut out first: a resize told to look at a box only lets pixels from outside it bleed into the border.
        box = image.crop((left, top, left + w, top + h))
        square = box.resize((one.size, one.size), Image.Resampling.BILINEAR)
        crops.append(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)))
    return crops


def _float(whole: npt.NDArray[Any]) -> FloatArray:
    return whole.astype(np.float32)
