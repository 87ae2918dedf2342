"""Stable Diffusion image variations: the CLIP image embedding is the only token that the denoiser attends to.

Weights: StableDiffusionImageVariationPipeline, such as lambdalabs/sd-image-variations-diffusers. For equal seeds and
parameters the latents are the stock pipeline's with a DDIM scheduler (to 1e-4), but every row has its own guidance.
The safety checker is neither loaded nor run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import UNet2DConditionModel

from genssl.data.base import UInt8Array
from genssl.generators.diffusion.configs import ImageVariationConfig
from genssl.generators.diffusion.guided import Deterministic, GuidedDiffusion
from genssl.generators.diffusion.loading import (
    check_width,
    image_encoder,
    licence_of,
    load_network,
    load_vae,
    pipeline_files,
)
from genssl.generators.fingerprint import fingerprint_model
from genssl.generators.models import find_model
from genssl.generators.parameters import Parameters
from genssl.generators.preprocessing import VERSIONS, Rule

SAMPLER_VERSION = "image_variation/1"
PIPELINE = "StableDiffusionImageVariationPipeline"
PARTS = ("feature_extractor", "image_encoder", "scheduler", "unet", "vae")


class ImageVariation(GuidedDiffusion):
    """An image-variation model on one device.

    Args:
        config: names the model and gives the default parameters.
        device: where the networks run.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or has no safetensors weights.
    """

    def __init__(self, config: ImageVariationConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE, PARTS)
        dtype = getattr(torch, config.dtype)
        self._squash = config.preprocess == "card"
        rule: Rule = "square" if config.preprocess == "card" else config.preprocess
        self._image_encoder, preprocessing = image_encoder(folder, dtype, device, rule=rule)
        self._unet = load_network(UNet2DConditionModel, folder, "unet", dtype, device)
        self._vae = load_vae(folder, dtype, device)
        width = int(self._image_encoder.config.projection_dim)
        check_width(folder, "the image encoder's embedding", width, "the UNet's cross-attention", self._unet)
        scale = 2 ** (len(self._vae.config["block_out_channels"]) - 1)
        super().__init__(
            config,
            device,
            sampler=Deterministic(folder, config.timestep_spacing),
            preprocessing=preprocessing,
            latents=(int(self._unet.config["in_channels"]), scale),
        )
        # "preprocess=clip" is what the rule `square` was called before there was another.
        seen = "card" if self._squash else VERSIONS[rule].removesuffix("/1")
        facts = (config.dtype, f"spacing={config.timestep_spacing}", f"preprocess={seen}", *self._sampler.facts)
        files = pipeline_files(folder, ["image_encoder", "unet", "vae"], ["feature_extractor", "scheduler"])
        self._describe(
            config,
            fingerprint=fingerprint_model(folder, files, SAMPLER_VERSION, *facts),
            embedding_dim=width,
            native_size=int(self._unet.config["sample_size"]) * scale,
            licence=licence_of(folder, "see the model's page (SD image variations: CreativeML OpenRAIL-M)"),
            settings=("timestep_spacing", "preprocess", "image_size", "output_size"),
        )

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings uint8 [3, H, W] to the image encoder's square.

        By the card's rule it is squashed, bicubic and not antialiased. The result is rounded and clipped to 0..255,
        which the card's code does not do: a difference of up to half a grey level, and more where bicubic overshoots.
        """
        if not self._squash:
            return super().preprocess(image)
        size = self._preprocessing.size
        pixels = torch.from_numpy(image.copy())[None].float()
        squashed = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=False)
        result: UInt8Array = squashed[0].round().clamp(0, 255).to(torch.uint8).numpy()
        return result

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, embedding_dim], not normalised, on the CPU."""
        pixels = self._preprocessing.normalise(images).to(self._device, self._dtype)
        embeddings: torch.Tensor = self._image_encoder(pixels).image_embeds
        return embeddings.float().cpu()

    def _condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings[:, None]

    def _unconditioned(self, condition: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(condition)

    def _output(
        self,
        x: torch.Tensor,
        timestep: float,
        condition: torch.Tensor,
        guided: bool,
        shared: Parameters,
        own: Mapping[str, Sequence[float]],
    ) -> torch.Tensor:
        output: torch.Tensor = self._unet(x, timestep, encoder_hidden_states=condition, return_dict=False)[0]
        return output

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self._vae.decode(latents / self._vae.config["scaling_factor"], return_dict=False)[0]
        return images
