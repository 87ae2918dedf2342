"""The `autoencoder` section of a generator's recipe: what turns images into latents and back."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from genssl.config.base import Section

Count = Annotated[int, Field(ge=1)]


class AutoencoderConfig(Section):
    """A KL autoencoder (Rombach et al. 2022), given or trained here on the images.

    Each channel count beyond the first halves the resolution.
    """

    model: str | None = Field(
        None,
        min_length=1,
        description="folder or hub id of a diffusers AutoencoderKL, which is copied; nothing below is used then",
    )
    block_out_channels: list[Count] = Field([32, 64], min_length=1)
    latent_channels: Count = 4
    epochs: Count = 100
    batch_size: int = Field(128, ge=2)
    lr: float = Field(2e-3, gt=0)
    kl_weight: float = Field(1e-4, ge=0)
