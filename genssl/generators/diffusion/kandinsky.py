"""Kandinsky 2.2's decoder (arXiv 2310.03502): a CLIP bigG image embedding in, an image out, no text anywhere.

The image encoder lies in the prior's repository; the prior itself, which makes embeddings of text, is not needed. For
equal seeds and parameters the latents are the stock decoder's with a DDIM scheduler (to 1e-4).
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel, VQModel

from genssl.errors import GeneratorError
from genssl.generators.diffusion.configs import KandinskyConfig
from genssl.generators.diffusion.guided import Columns, GuidedDiffusion
from genssl.generators.diffusion.loading import factor_of, load_network, pipeline_files
from genssl.generators.diffusion.sampling import read_ddim
from genssl.generators.diffusion.unclip_encoder import CLIPEncoder
from genssl.generators.fingerprint import Fact, fingerprint_model, network_files
from genssl.generators.models import find_model, licence_of

SAMPLER_VERSION = "kandinsky/1"
PIPELINE = "KandinskyV22Pipeline"
PARTS = ("scheduler", "unet", "movq")
PRIOR_PIPELINE = "KandinskyV22PriorPipeline"
PRIOR_PARTS = ("image_encoder", "image_processor")


class Kandinsky(GuidedDiffusion):
    """A Kandinsky 2.2 decoder with its image encoder on one device.

    Raises:
        GeneratorError: if a part cannot be found, is of another kind, does not fit, or has no safetensors weights.
    """

    SETTINGS = ("revision", "dtype", "prior", "prior_revision", "preprocess", "image_size", "output_size")

    def __init__(self, config: KandinskyConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE, PARTS)
        prior = find_model(config.prior, config.prior_revision, PRIOR_PIPELINE, PRIOR_PARTS, key="generator.prior")
        dtype = getattr(torch, config.dtype)
        self._encoder = encoder = CLIPEncoder(prior, dtype, device, processor="image_processor", rule=config.preprocess)
        self._unet = load_network(UNet2DConditionModel, folder, "unet", dtype, device)
        self._vae = load_network(VQModel, folder, "movq", dtype, device)
        sampler, scale = read_ddim(folder), factor_of(self._vae)
        channels = int(self._unet.config["in_channels"])
        super().__init__(config, device, sampler=sampler, channels=channels, scale=scale)
        # The stock pipeline rounds sizes up to a multiple of the factor squared; here others are refused.
        self._multiple = scale**2
        side = int(encoder.network().config.image_size)
        blank = torch.zeros((1, 3, side, side), device=device, dtype=dtype)
        with torch.inference_mode():
            # The embedding of a zero image, as the prior's pipeline makes it for guidance.
            self._blank = encoder.network()(blank).image_embeds
        projection = getattr(getattr(self._unet, "encoder_hid_proj", None), "image_embeds", None)
        expected = getattr(projection, "in_features", None)
        if expected != encoder.embedding_dim:
            raise GeneratorError(
                f"{folder}: the decoder takes embeddings of {expected} numbers, and generator.prior's image encoder "
                f"makes {encoder.embedding_dim}; take the prior that belongs to the decoder"
            )
        vision, processor = (prior / part for part in PRIOR_PARTS)
        parts: list[Fact] = [
            ("", fingerprint_model(vision, network_files(vision))),
            ("", fingerprint_model(processor, ["preprocessor_config.json"])),
        ]
        files = pipeline_files(folder, ["unet", "movq"], ["scheduler"])
        facts: list[Fact] = [*parts, *encoder.facts(), *sampler.facts]
        fingerprint = fingerprint_model(folder, files, SAMPLER_VERSION, config.dtype, *facts)
        licence = licence_of(folder, "see the model's page (Kandinsky 2.2: Apache-2.0)")
        self._describe_sizes(config, fingerprint, int(self._unet.config["sample_size"]) * scale, licence)

    def _unconditioned(self, condition: torch.Tensor) -> torch.Tensor:
        blank: torch.Tensor = self._blank.expand_as(condition)
        return blank

    def _output(self, x: torch.Tensor, time: float, condition: torch.Tensor, own: Columns, free: int) -> torch.Tensor:
        added = {"image_embeds": condition}
        output = self._unet(x, time, encoder_hidden_states=None, added_cond_kwargs=added, return_dict=False)[0]
        # The second half is a learned variance, which deterministic steps do not read.
        mean: torch.Tensor = output[:, : self._channels]
        return mean

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self._vae.decode(latents, force_not_quantize=True, return_dict=False)[0]
        return images
