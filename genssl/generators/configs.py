"""Settings of the generators. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genssl.config.base import ComponentConfig


class GeneratorConfig(ComponentConfig):
    """What every generator has: an id under which a server offers it."""

    id: str | None = Field(None, pattern=r"^[\w.-]+$", description="name on the server; by default the registry name")


class StableUnCLIPConfig(GeneratorConfig):
    """Stable Diffusion unCLIP.

    Defaults are the paper's sampler: DDIM, 10 steps, trailing, zero-SNR, eta 0, guidance 10, noise level 0.
    """

    name: Literal["stable_unclip"] = "stable_unclip"
    model: str = Field(min_length=1, description="builtin:NAME, a diffusers folder, or a hub id")
    revision: str | None = Field(None, description="commit of a hub model; pin it")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_inference_steps: int = Field(10, ge=1, le=1000)
    guidance_scale: float = Field(10.0, ge=0, le=100, description="1 or less: no guidance, and half the cost")
    noise_level: int = Field(
        0, ge=0, le=999, description="noise on the image embedding; more means more diverse and less like the source"
    )
    zero_terminal_snr: bool = Field(True, description="start from pure noise; false for models that predict epsilon")
    image_size: int | None = Field(
        None, ge=8, le=2048, description="pixels of the generated square; by default the model's native size"
    )
    output_size: int | None = Field(
        None, ge=8, le=2048, description="generated images are shrunk to this many pixels; by default not at all"
    )


class FlowConfig(GeneratorConfig):
    """A rectified flow on self-supervised features, as `genssl train-generator` makes it."""

    name: Literal["flow"] = "flow"
    model: str = Field(min_length=1, description="builtin:NAME, or a folder that `genssl train-generator` wrote")
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_inference_steps: int = Field(4, ge=1, le=1000, description="Euler steps; fewer are faster and less diverse")
    guidance_scale: float = Field(1.0, ge=0, le=100, description="1 or less: no guidance, and half the cost")
    embedding_noise: float = Field(
        0.0, ge=0, le=10, description="noise on the embedding; more means more diverse and less like the source"
    )


class ICGANConfig(GeneratorConfig):
    """An instance-conditioned GAN: one forward pass an image.

    Truncation 0.7 is the setting of the paper that genssl follows (GenerativeSSL).
    """

    name: Literal["icgan"] = "icgan"
    model: str = Field(
        min_length=1,
        description="builtin:NAME, or a folder that `genssl train-generator` or `genssl convert-weights` wrote",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    truncation: float = Field(
        0.7, ge=0, le=4, description="noise stays within twice this; more means more diverse and less like the source"
    )
    best_of: int = Field(
        1, ge=1, le=64, description="this many tries an image, of which the one nearest to the source is kept"
    )
    class_id: int | None = Field(None, ge=0, description="class of a class-conditional model; by default 0")
    preprocess: Literal["train", "colab", "raw"] | None = Field(
        None, description="how official models see a source; by default as convert-weights was told"
    )
    output_size: int | None = Field(
        None, ge=8, le=2048, description="generated images are resized to this many pixels; by default not at all"
    )
