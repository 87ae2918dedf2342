"""Stable Diffusion image variations: the CLIP image embedding is the only token that the denoiser attends to.

Weights: StableDiffusionImageVariationPipeline, such as lambdalabs/sd-image-variations-diffusers. For equal seeds and
parameters the latents are the stock pipeline's with a DDIM scheduler (to 1e-4), but every row has its own guidance.
The safety checker is neither loaded nor run.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError
from genssl.generators.diffusion.configs import ImageVariationConfig
from genssl.generators.diffusion.guided import Columns, GuidedDiffusion
from genssl.generators.diffusion.loading import factor_of, load_network, load_vae, pipeline_files
from genssl.generators.diffusion.sampling import read_ddim
from genssl.generators.diffusion.unclip_encoder import CLIPEncoder
from genssl.generators.fingerprint import fingerprint_model
from genssl.generators.models import find_model, licence_of
from genssl.generators.preprocessing import VERSIONS, Rule

SAMPLER_VERSION = "image_variation/1"
PIPELINE = "StableDiffusionImageVariationPipeline"
PARTS = ("feature_extractor", "image_encoder", "scheduler", "unet", "vae")


class ImageVariation(GuidedDiffusion):
    """An image-variation model on one device.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or has no safetensors weights.
    """

    SETTINGS = ("revision", "dtype", "timestep_spacing", "preprocess", "image_size", "output_size")
    _encoder: CLIPEncoder

    def __init__(self, config: ImageVariationConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE, PARTS)
        dtype = getattr(torch, config.dtype)
        self._squash = config.preprocess == "card"
        rule: Rule = "square" if config.preprocess == "card" else config.preprocess
        self._encoder = CLIPEncoder(folder, dtype, device, rule=rule)
        self._unet = load_network(UNet2DConditionModel, folder, "unet", dtype, device)
        self._vae = load_vae(folder, dtype, device)
        width, wanted = self._encoder.embedding_dim, self._unet.config["cross_attention_dim"]
        if width != wanted:
            raise GeneratorError(
                f"{folder}: the image encoder's embedding has {width} numbers, but the UNet's cross-attention takes "
                f"{wanted}; the parts do not fit"
            )
        sampler, scale = read_ddim(folder, config.timestep_spacing), factor_of(self._vae)
        channels = int(self._unet.config["in_channels"])
        super().__init__(config, device, sampler=sampler, channels=channels, scale=scale)
        # "preprocess=clip" is what the rule `square` was called before there was another.
        seen = "card" if self._squash else VERSIONS[rule].removesuffix("/1")
        facts = (config.dtype, f"spacing={config.timestep_spacing}", f"preprocess={seen}", *sampler.facts)
        files = pipeline_files(folder, ["image_encoder", "unet", "vae"], ["feature_extractor", "scheduler"])
        fingerprint = fingerprint_model(folder, files, SAMPLER_VERSION, *facts)
        licence = licence_of(folder, "see the model's page (SD image variations: CreativeML OpenRAIL-M)")
        self._describe_sizes(config, fingerprint, int(self._unet.config["sample_size"]) * scale, licence)

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings uint8 [3, H, W] to the image encoder's square.

        By the card's rule it is squashed, bicubic and not antialiased. The result is rounded and clipped to 0..255,
        which the card's code does not do: a difference of up to half a grey level, and more where bicubic overshoots.
        """
        if not self._squash:
            return super().preprocess(image)
        size = self._encoder.preprocessing.size
        pixels = torch.from_numpy(image.copy())[None].float()
        squashed = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=False)
        result: UInt8Array = squashed[0].round().clamp(0, 255).to(torch.uint8).numpy()
        return result

    def _condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings[:, None]

    def _output(self, x: torch.Tensor, time: float, condition: torch.Tensor, own: Columns, free: int) -> torch.Tensor:
        output: torch.Tensor = self._unet(x, time, encoder_hidden_states=condition, return_dict=False)[0]
        return output
