"""Kandinsky 2.2's decoder (arXiv 2310.03502): a CLIP bigG image embedding in, an image out, no text anywhere.

The image encoder lies in the prior's repository; the prior itself, which makes embeddings of text, is not needed. For
equal seeds and parameters the latents are the stock decoder's with a DDIM scheduler (to 1e-4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, VQModel

from genssl.errors import GeneratorError
from genssl.generators.diffusion.configs import KandinskyConfig
from genssl.generators.diffusion.guided import Deterministic, GuidedDiffusion
from genssl.generators.diffusion.loading import image_encoder, licence_of, load_network, pipeline_files
from genssl.generators.fingerprint import fingerprint_model, network_files
from genssl.generators.models import find_model
from genssl.generators.parameters import Parameters

SAMPLER_VERSION = "kandinsky/1"
PIPELINE = "KandinskyV22Pipeline"
PARTS = ("scheduler", "unet", "movq")
PRIOR_PIPELINE = "KandinskyV22PriorPipeline"
PRIOR_PARTS = ("image_encoder", "image_processor")


class Kandinsky(GuidedDiffusion):
    """A Kandinsky 2.2 decoder with its image encoder on one device.

    Args:
        config: names the decoder and the prior's repository, and gives the default parameters.
        device: where the networks run.

    Raises:
        GeneratorError: if a part cannot be found, is of another kind, does not fit, or has no safetensors weights.
    """

    def __init__(self, config: KandinskyConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE, PARTS)
        prior = find_model(config.prior, config.prior_revision, PRIOR_PIPELINE, PRIOR_PARTS, key="generator.prior")
        dtype = getattr(torch, config.dtype)
        self._image_encoder, preprocessing = image_encoder(prior, dtype, device, "image_processor", config.preprocess)
        self._unet = load_network(UNet2DConditionModel, folder, "unet", dtype, device)
        self._movq = load_network(VQModel, folder, "movq", dtype, device)
        scale = 2 ** (len(self._movq.config["block_out_channels"]) - 1)
        super().__init__(
            config,
            device,
            sampler=Deterministic(folder),
            preprocessing=preprocessing,
            latents=(int(self._unet.config["in_channels"]), scale),
        )
        # The stock pipeline rounds sizes up to a multiple of the factor squared; here others are refused.
        self._multiple = scale**2
        side = int(self._image_encoder.config.image_size)
        blank = torch.zeros((1, 3, side, side), device=device, dtype=dtype)
        with torch.inference_mode():
            # The embedding of a zero image, as the prior's pipeline makes it for guidance.
            self._blank = self._image_encoder(blank).image_embeds
        width = int(self._image_encoder.config.projection_dim)
        _check_width(folder, self._unet, width)
        encoder, processor = (prior / part for part in PRIOR_PARTS)
        parts = [
            ("", fingerprint_model(encoder, network_files(encoder))),
            ("", fingerprint_model(processor, ["preprocessor_config.json"])),
        ]
        files = pipeline_files(folder, ["unet", "movq"], ["scheduler"])
        facts = [*preprocessing.facts(), *self._sampler.facts]
        self._describe(
            config,
            fingerprint=fingerprint_model(folder, files, SAMPLER_VERSION, config.dtype, *parts, *facts),
            embedding_dim=width,
            native_size=int(self._unet.config["sample_size"]) * scale,
            licence=licence_of(folder, "see the model's page (Kandinsky 2.2: Apache-2.0)"),
            settings=("prior", "prior_revision", "preprocess", "image_size", "output_size"),
        )

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, embedding_dim], not normalised, on the CPU."""
        pixels = self._preprocessing.normalise(images).to(self._device, self._dtype)
        embeddings: torch.Tensor = self._image_encoder(pixels).image_embeds
        return embeddings.float().cpu()

    def _condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings

    def _unconditioned(self, condition: torch.Tensor) -> torch.Tensor:
        blank: torch.Tensor = self._blank.expand_as(condition)
        return blank

    def _output(
        self,
        x: torch.Tensor,
        timestep: float,
        condition: torch.Tensor,
        guided: bool,
        shared: Parameters,
        own: Mapping[str, Sequence[float]],
    ) -> torch.Tensor:
        output = self._unet(
            x, timestep, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": condition}, return_dict=False
        )[0]
        # The second half is a learned variance, which deterministic steps do not read.
        mean: torch.Tensor = output[:, : self._channels]
        return mean

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self._movq.decode(latents, force_not_quantize=True, return_dict=False)[0]
        return images


def _check_width(folder: Path, unet: torch.nn.Module, width: int) -> None:
    projection = getattr(getattr(unet, "encoder_hid_proj", None), "image_embeds", None)
    expected = getattr(projection, "in_features", None)
    if expected != width:
        raise GeneratorError(
            f"{folder}: the decoder takes embeddings of {expected} numbers, and generator.prior's image encoder makes "
            f"{width}; take the prior that belongs to the decoder"
        )
