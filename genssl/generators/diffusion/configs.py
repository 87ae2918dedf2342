"""Settings of the generators whose networks are diffusers' own, besides Stable unCLIP. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genssl.generators.configs import GeneratorConfig

CLIP_OR_SQUARE = (
    "how the image encoder is shown a source; clip: resized, then the centre cut out, as the stock pipeline does; "
    "square: cut out, then resized, as genssl once did, for stores of that time"
)


class DiffusersConfig(GeneratorConfig):
    """What every generator on a diffusers folder has."""

    model: str = Field(min_length=1, description="a diffusers folder, or a hub id")
    revision: str | None = Field(None, description="commit or tag of a hub model; pin it")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    image_size: int | None = Field(
        None, ge=8, le=2048, description="pixels of the generated square; by default the model's native size"
    )
    output_size: int | None = Field(
        None, ge=8, le=2048, description="generated images are resized to this many pixels; by default not at all"
    )


class ImageVariationConfig(DiffusersConfig):
    """Stable Diffusion image variations: a CLIP image embedding takes the place of the prompt.

    Defaults follow the card of lambdalabs/sd-image-variations-diffusers (revision v2.0), but for the number of steps.
    """

    name: Literal["image_variation"] = "image_variation"
    num_inference_steps: int = Field(25, ge=1, le=1000, description="DDIM steps")
    guidance_scale: float = Field(3.0, ge=0, le=100, description="1 or less: no guidance, and half the cost")
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None, description="of the DDIM steps; by default as the model's scheduler has it"
    )
    preprocess: Literal["card", "clip", "square"] = Field(
        "card",
        description="card: squashed to the encoder's square, not antialiased, as the model was trained; clip: resized, "
        "then the centre cut out, as the stock pipeline does; square: cut out, then resized, as clip once was",
    )


class IPAdapterConfig(DiffusersConfig):
    """Stable Diffusion 1.5 or SDXL with an IP-Adapter, and optionally a few-step LoRA.

    For LCM-LoRA: sampler lcm, 4 steps, guidance 1. For Hyper-SD: sampler ddim_trailing (its LoRAs of 2, 4 or 8 steps)
    or tcd (its unified LoRA of 1 step), guidance 1.
    """

    name: Literal["ip_adapter"] = "ip_adapter"
    adapter: str = Field(
        min_length=1,
        description="safetensors file, base or plus; or OWNER/NAME[@REVISION]/FILE on the hub, such as "
        "h94/IP-Adapter/models/ip-adapter_sd15.safetensors",
    )
    image_encoder: str = Field(
        min_length=1,
        description="folder of the CLIP vision model; or OWNER/NAME[@REVISION]/FOLDER on the hub, such as "
        "h94/IP-Adapter/models/image_encoder",
    )
    lora: str | None = Field(None, description="safetensors file of a LoRA, or OWNER/NAME[@REVISION]/FILE on the hub")
    lora_scale: float = Field(1.0, ge=0, le=4, description="1: the whole LoRA")
    sampler: Literal["ddim", "ddim_trailing", "lcm", "tcd"] = Field("ddim", description="few-step LoRAs name theirs")
    gamma: float = Field(0.3, ge=0, le=1, description="of sampler tcd: how much of a step is new noise")
    prompt: str = Field("", description="one text for all images; embedded once")
    preprocess: Literal["clip", "square"] = Field("clip", description=CLIP_OR_SQUARE)
    num_inference_steps: int = Field(25, ge=1, le=1000)
    guidance_scale: float = Field(5.0, ge=0, le=100, description="1 or less: no guidance, and half the cost")
    adapter_scale: float = Field(1.0, ge=0, le=10, description="weight of the image; less means less like the source")


class KandinskyConfig(DiffusersConfig):
    """Kandinsky 2.2's decoder on CLIP bigG embeddings, such as kandinsky-community/kandinsky-2-2-decoder."""

    name: Literal["kandinsky"] = "kandinsky"
    prior: str = Field(
        min_length=1,
        description="a folder or hub id, such as kandinsky-community/kandinsky-2-2-prior, of which the image encoder "
        "alone is read",
    )
    prior_revision: str | None = Field(None, description="commit or tag of a prior on the hub; pin it")
    preprocess: Literal["clip", "square"] = Field("clip", description=CLIP_OR_SQUARE)
    num_inference_steps: int = Field(25, ge=1, le=1000, description="DDIM steps")
    guidance_scale: float = Field(4.0, ge=0, le=100, description="1 or less: no guidance, and half the cost")


class Flux2KleinConfig(DiffusersConfig):
    """FLUX.2 klein, such as black-forest-labs/FLUX.2-klein-4B: a source as reference image, and one prompt for all."""

    name: Literal["flux2_klein"] = "flux2_klein"
    prompt: str = Field("a different photo of the same subject", description="one text for all images; embedded once")
    prompt_tokens: int = Field(512, ge=16, le=512, description="tokens to which the prompt is padded; 512 in the stock")
    reference_size: int = Field(
        512, ge=64, le=1024, multiple_of=16, description="pixels of the square to which a source is brought"
    )
    num_inference_steps: int = Field(4, ge=1, le=1000, description="Euler steps")
    guidance_scale: float = Field(
        1.0, ge=0, le=100, description="for base models only, compared with no prompt; distilled ones take none"
    )
