"""Variants whose distance from their source is known: the image with noise of a given strength."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class Pixels(nn.Module):
    """Features are the pixels, in [0, 1]."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def noisy(strength: float):
    """Returns variants: the source with Gaussian noise of so many grey levels; at 0, copies of it."""

    def variants(split, rows, index):
        images = []
        for row in rows:
            image = split.image(row)
            random = np.random.default_rng((row, index, len(split)))
            image = image + strength * random.standard_normal(image.shape)
            images.append(np.rint(image).clip(0, 255).astype(np.uint8))
        return np.stack(images)

    return variants
