"""The discriminator of IC-GAN training, and the augmentation in front of it."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from genssl.generator_training.rows import Draws


class DownBlock(nn.Module):
    """Residual block with spectral norm; halves the side by averaging if told, maps channels."""

    def __init__(self, inputs: int, outputs: int, *, activate_first: bool, halve: bool) -> None:
        super().__init__()
        self.activate_first = activate_first
        self.halve = halve
        self.conv1 = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x [B, C, h, w] to [B, C', h / 2, w / 2], or to [B, C', h, w]."""
        h = F.relu(x) if self.activate_first else x
        out: torch.Tensor = self.conv2(F.relu(self.conv1(h))) + self.shortcut(x)
        return F.avg_pool2d(out, 2) if self.halve else out


class Discriminator(nn.Module):
    """Projection discriminator (Miyato & Koyama 2018, arXiv 1802.05637) over images and instance features.

    Args:
        channels: after each block but the last; all those blocks halve the side.
        feature_dim: width of the instance feature.
    """

    def __init__(self, channels: list[int], feature_dim: int) -> None:
        super().__init__()
        blocks = [
            DownBlock(inputs, outputs, activate_first=number > 0, halve=True)
            for number, (inputs, outputs) in enumerate(pairwise([3, *channels]))
        ]
        blocks.append(DownBlock(channels[-1], channels[-1], activate_first=True, halve=False))
        self.blocks = nn.Sequential(*blocks)
        self.realness = spectral_norm(nn.Linear(channels[-1], 1))
        self.project = spectral_norm(nn.Linear(feature_dim, channels[-1]))

    def forward(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Scores how real images are and how well they fit their feature.

        Args:
            images: float [B, 3, S, S] in [-1, 1].
            features: float [B, feature_dim].

        Returns:
            float [B]: `linear(h) + <project(feature), h>`, with h the last feature map summed over positions.
        """
        h = F.relu(self.blocks(images)).sum(dim=(2, 3))
        projected = self.project(features)
        scores: torch.Tensor = self.realness(h)[:, 0] + (projected * h).sum(dim=1)
        return scores


def diff_augment(
    images: torch.Tensor, draws: Draws, *, translation: float, cutout: float, groups: int = 1
) -> torch.Tensor:
    """Shifts images and blanks a square in them, differentiably, a draw a row (Zhao et al. 2020, arXiv 2006.10738).

    Args:
        images: float [B, C, S, S] in [-1, 1].
        draws: random stream.
        translation: largest shift as a part of the side; what comes in from outside is 0.
        cutout: side of the blank square as a part of the image's; 0 leaves it out.
        groups: the images are so many batches, one after the other; see `Draws.own`.

    Returns:
        float, the images' shape.
    """
    batch, _, height, width = images.shape
    rows, columns = torch.arange(height), torch.arange(width)

    def two_integers(low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = draws.integer_columns(2, low, high, batch, groups)
        return first.view(-1, 1), second.view(-1, 1)

    if (shift := round(translation * height)) > 0:
        down, right = two_integers(-shift, shift + 1)
        from_rows = (rows - down + shift).clamp(0, height + 2 * shift - 1).to(images.device)
        from_columns = (columns - right + shift).clamp(0, width + 2 * shift - 1).to(images.device)
        padded = F.pad(images, (shift,) * 4)
        which = torch.arange(batch, device=images.device)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[which, from_rows[:, :, None], from_columns[:, None, :]].permute(0, 3, 1, 2)
    if (side := round(cutout * height)) > 0:
        top, left = two_integers(1 - side, height)
        outside = ((rows < top) | (rows >= top + side))[:, :, None] | ((columns < left) | (columns >= left + side))[
            :, None, :
        ]
        images = images * outside[:, None].to(images)
    return images
