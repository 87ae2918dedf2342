"""Stable unCLIP: diffusers' own networks under our own sampler.

The stock pipeline takes one noise level and one guidance scale a call, repeats one noised embedding over the variants
of an image, and keeps the text encoder for a prompt that is always empty. Here every row has its own noise level,
guidance, guided steps and seed, the empty prompt is embedded once, and image embeddings are cached by the caller. For
equal seeds and equal parameters the images are the stock pipeline's (to 1 grey level).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from genssl.errors import GeneratorError
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.guided import Columns, GuidedDiffusion
from genssl.generators.diffusion.loading import embed_prompts, factor_of, load_decoder, load_network, pipeline_files
from genssl.generators.diffusion.sampling import read_trailing_ddim
from genssl.generators.diffusion.scheduler_config import NOISING_FIELDS, build_scheduler, read_scheduler
from genssl.generators.diffusion.unclip_encoder import CLIPEncoder, SelfSupervisedEncoder, open_image_encoder
from genssl.generators.fingerprint import fingerprint_model
from genssl.generators.models import find_model, licence_of
from genssl.generators.parameters import Parameters

SAMPLER_VERSION = "stable_unclip/1"
PIPELINE = "StableUnCLIPImg2ImgPipeline"


class StableUnCLIP(GuidedDiffusion):
    """A Stable unCLIP model on one device; knows the foreground with a CLIP, not with an encoder of genssl.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or has no safetensors weights, or if its
            parts do not fit each other.
    """

    BY_ROW = ("guidance_scale", "guidance_start", "guidance_end", "noise_level")
    NOISE = "noise_level"
    PARAMETERS = ("num_inference_steps", *BY_ROW, "image_size", "output_size")
    SETTINGS = (
        "revision", "dtype", "tiny_vae", "compile", "preprocess", "zero_terminal_snr", "image_size", "output_size",
    )  # fmt: skip

    _encoder: CLIPEncoder | SelfSupervisedEncoder

    def __init__(self, config: StableUnCLIPConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE)
        dtype: torch.dtype = getattr(torch, config.dtype)
        # With embeddings on disk it may never be needed; without, its faults should show now.
        self._encoder = encoder = open_image_encoder(
            folder, dtype, device, lazy=config.embedding_cache is not None, rule=config.preprocess
        )
        if isinstance(encoder, CLIPEncoder):
            self.embed_with_foreground = encoder.embed_with_foreground
        self.release_conditioner = encoder.release
        self._unet = load_network(UNet2DConditionModel, folder, "unet", dtype, device)
        self._vae, decoder = load_decoder(folder, config.tiny_vae, dtype, device)
        channels = int(self._unet.config["in_channels"])
        if (found := self._vae.config["latent_channels"]) != channels:
            raise GeneratorError(
                f"{folder}: the autoencoder decodes {found} channels and the denoiser makes {channels}; "
                "the files belong to different models"
            )
        width = encoder.embedding_dim
        if (wanted := self._unet.config["projection_class_embeddings_input_dim"]) != 2 * width:
            raise GeneratorError(
                f"{folder}: the image encoder makes {width} numbers an image and the denoiser takes {wanted} instead "
                "of twice as many; the files belong to different models"
            )
        if device.type == "cuda":
            self._unet.to(memory_format=torch.channels_last)
            self._vae.to(memory_format=torch.channels_last)
        # Embedding arithmetic stays in float32: the normaliser divides by small standard deviations.
        self._normalizer = load_network(
            StableUnCLIPImageNormalizer, folder, "image_normalizer", torch.float32, torch.device("cpu")
        )
        noising = read_scheduler(folder, NOISING_FIELDS, "image_noising_scheduler")
        self._noising = build_scheduler(DDPMScheduler, folder, noising, "image_noising_scheduler")
        sampler, scale = read_trailing_ddim(folder, config.zero_terminal_snr), factor_of(self._vae)
        super().__init__(config, device, sampler=sampler, channels=channels, scale=scale)
        self._text = embed_prompts(folder, [""], False, dtype, device)[0].tokens
        fingerprint = fingerprint_model(
            folder,
            [*encoder.files(), *_files(folder, config.tiny_vae)],
            SAMPLER_VERSION,
            config.dtype,
            f"zero_snr={config.zero_terminal_snr}",
            *decoder,
            *encoder.facts(),
            *sampler.facts,
            *(["compiled"] if config.compile else []),
        )
        licence = licence_of(folder, "see the model's page (Stable Diffusion 2.1: CreativeML OpenRAIL++-M)")
        self._describe_sizes(config, fingerprint, int(self._unet.config["sample_size"]) * scale, licence)
        if config.compile:  # in place; batches are padded to few sizes, each of which is compiled once
            self._compiled = True
            self._unet.compile(dynamic=False)
            self._vae.decoder.compile(dynamic=False)

    def conditioner_fingerprint(self) -> bytes:
        """See `HasConditionerFingerprint`."""
        return self._encoder.fingerprint().digest

    def former_conditioner_fingerprint(self) -> bytes:
        """Returns the 16 bytes that the image encoder had when every file of its folder counted."""
        return self._encoder.fingerprint().former()

    def _bounds(self) -> dict[str, tuple[float, float]]:
        levels = int(self._noising.config["num_train_timesteps"])
        return super()._bounds() | {
            "guidance_start": (0, 1),
            "guidance_end": (0, 1),
            "noise_level": (0, levels - 1),
        }

    def generate_exact(
        self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Sequence[Parameters], **hooks: Any
    ) -> torch.Tensor:
        """See `GeneratesExactly`; a step in which some rows are guided and some are not takes a forward more."""
        return self.generate(embeddings, seeds, parameters, exact=True, **hooks)

    def _noised(self, embeddings: torch.Tensor, noise: torch.Tensor, levels: list[float | int]) -> torch.Tensor:
        steps = torch.tensor([int(level) for level in levels])
        return noise_embeddings(self._normalizer, self._noising, embeddings, noise, steps)

    def _output(self, x: torch.Tensor, time: float, condition: torch.Tensor, own: Columns, free: int) -> torch.Tensor:
        text = self._text.expand(len(x), -1, -1)
        # A tensor, since a compiled network would be compiled anew for every number.
        step = torch.tensor(time, device=self._device)
        output: torch.Tensor = self._unet(
            x, step, encoder_hidden_states=text, class_labels=condition, return_dict=False
        )[0]
        return output

    def _costly_decode(self, latents: torch.Tensor) -> Any:
        return self._vae.decoder(latents)


def noise_embeddings(
    normalizer: StableUnCLIPImageNormalizer,
    noising: DDPMScheduler,
    embeddings: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
) -> torch.Tensor:
    """Noises embeddings row by row and appends the sinusoidal embedding of the level; shared with the trainer.

    Args:
        normalizer, noising: of the model.
        embeddings, noise: float32 [B, D].
        levels: int64 [B], 0 to the noising schedule's length minus 1.

    Returns:
        float32 [B, 2 D]: what the UNet takes as class labels.
    """
    noised = normalizer.unscale(noising.add_noise(normalizer.scale(embeddings), timesteps=levels, noise=noise))
    encoded = get_timestep_embedding(levels, embeddings.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, encoded], dim=1)


def _files(folder: Path, tiny_vae: str | None) -> list[str]:
    """Returns what is loaded of a model's folder besides the image encoder; of a replaced autoencoder the config."""
    networks = ["unet", "image_normalizer", "text_encoder"]
    others = ["image_noising_scheduler", "scheduler", "tokenizer"]
    if tiny_vae is None:
        return pipeline_files(folder, [*networks, "vae"], others)
    return [*pipeline_files(folder, networks, others), "vae/config.json"]
