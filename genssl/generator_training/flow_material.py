"""What a flow and its student are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genssl.generator_training.autoencoder import Latents
from genssl.generator_training.rows import Draws, Images
from genssl.generators.flow import noise_embeddings

CLEAN_PART = 1 / 3  # of the rows sees embeddings without noise, which most users ask for


@dataclass(frozen=True)
class Material:
    """Images and their embeddings.

    Attributes:
        images: of the train split.
        embeddings: float32 [N, D] on the CPU, as `Conditioner.embed` gives them.
        latents: of the images, for a flow of latents.
    """

    images: Images
    embeddings: torch.Tensor
    latents: Latents | None = None

    def clean(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns what the flow ends in, float32 [B, C, h, w] on the device: images in [-1, 1], or latents."""
        return self.images[rows].float() / 127.5 - 1 if self.latents is None else self.latents[rows]

    def condition(self, rows: torch.Tensor, max_noise: float, draws: Draws) -> torch.Tensor:
        """Returns conditions float32 [B, D + 1] (CPU): embeddings with noise of 0..max_noise, on part of them none."""
        levels = max_noise * draws.uniform(len(rows))
        levels[draws.uniform(len(rows)) < CLEAN_PART] = 0
        chosen = self.embeddings[rows]
        return noise_embeddings(chosen, draws.normal(*chosen.shape), levels)
