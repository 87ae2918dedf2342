"""FLUX.2 klein: the source is a reference image whose latent tokens the transformer reads beside those it makes.

The embedding of a source is its autoencoder's latents, normalised and flattened; the prompt is one constant, embedded
at load, after which the text encoder is dropped. For equal seeds and parameters the latents are the stock pipeline's
(Flux2KleinPipeline, to 1e-4), which takes one reference for a whole batch where here every row has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

from genssl.errors import GeneratorError
from genssl.generators.diffusion.configs import Flux2KleinConfig
from genssl.generators.diffusion.guided import Columns, GuidedDiffusion
from genssl.generators.diffusion.loading import factor_of, load_network, load_part, pipeline_files
from genssl.generators.diffusion.sampling import Sampler
from genssl.generators.diffusion.scheduler_config import FLOW_FIELDS, build_scheduler, read_scheduler
from genssl.generators.fingerprint import fingerprint_model
from genssl.generators.models import DIFFUSERS, find_model, licence_of, read_json
from genssl.generators.preprocessing import Preprocessing

SAMPLER_VERSION = "flux2_klein/1"
PIPELINE = "Flux2KleinPipeline"
PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
NATIVE_SIZE = 1024
REFERENCE_TIME = 10  # the first axis of a reference token's position; that of a made one is 0


@dataclass(frozen=True)
class FlowStep:
    """One Euler step: the time that the transformer sees (0..1), and how far the flow is followed."""

    timestep: float
    length: float


class FlowEuler(Sampler):
    """Euler steps of a rectified flow, shifted towards noise the more the larger the image, as the folder says."""

    def __init__(self, folder: Path) -> None:
        self._scheduler = build_scheduler(FlowMatchEulerDiscreteScheduler, folder, read_scheduler(folder, FLOW_FIELDS))

    def steps(self, count: int, side: int = 0) -> list[FlowStep]:
        """Returns the `count` steps from noise to image for latents of `side` x `side` tokens."""
        shift = compute_empirical_mu(image_seq_len=side**2, num_steps=count)
        self._scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=shift)
        sigmas = self._scheduler.sigmas.tolist()
        times = (self._scheduler.timesteps / 1000).tolist()
        return [FlowStep(t, after - at) for t, at, after in zip(times, sigmas, sigmas[1:], strict=False)]

    def move(
        self, step: FlowStep, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Moves latents along the velocity that the transformer predicts, in float32."""
        return (latents.float() + step.length * output).to(latents.dtype)


class Flux2Klein(GuidedDiffusion):
    """A FLUX.2 klein model on one device.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or has no safetensors weights.
    """

    SETTINGS = ("revision", "dtype", "prompt", "prompt_tokens", "reference_size", "image_size", "output_size")

    def __init__(self, config: Flux2KleinConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE, PARTS)
        dtype = getattr(torch, config.dtype)
        self._distilled = bool(read_json(folder / DIFFUSERS).get("is_distilled", False))
        if self._distilled:
            self._notes = {"guidance_scale": ": the model is distilled"}
        self._transformer = load_network(Flux2Transformer2DModel, folder, "transformer", dtype, device)
        self._vae = load_network(AutoencoderKLFlux2, folder, "vae", dtype, device)
        channels = int(self._transformer.config["in_channels"])
        if channels != self._vae.bn.num_features:
            raise GeneratorError(
                f"{folder}: the transformer takes {channels} channels, and the autoencoder makes "
                f"{self._vae.bn.num_features}; the parts do not fit"
            )
        patch = 2 * factor_of(self._vae)
        super().__init__(config, device, sampler=FlowEuler(folder), channels=channels, scale=patch)
        self.preprocess = Preprocessing(config.reference_size).preprocess  # type: ignore[method-assign]
        self._given, self._empty = self._embed_prompts(folder, [config.prompt, ""], config.prompt_tokens)
        self._reference_side = config.reference_size // patch
        variance = self._vae.bn.running_var + self._vae.config["batch_norm_eps"]
        self._mean, self._std = (
            tensor.view(1, -1, 1, 1).to(device, dtype) for tensor in (self._vae.bn.running_mean, variance.sqrt())
        )
        facts = (config.dtype, f"prompt={config.prompt_tokens},{config.prompt}", f"reference={config.reference_size}")
        files = pipeline_files(folder, ["transformer", "vae", "text_encoder"], ["scheduler", "tokenizer"])
        files.append("text_encoder/generation_config.json")
        fingerprint = fingerprint_model(folder, files, SAMPLER_VERSION, *facts)
        licence = licence_of(folder, "see the model's page (FLUX.2 klein 4B: Apache-2.0)")
        width = channels * self._reference_side**2
        self._describe_sizes(config, fingerprint, NATIVE_SIZE, licence, embedding_dim=width)

    @torch.inference_mode()
    def _embed_prompts(self, folder: Path, prompts: list[str], length: int) -> list[torch.Tensor]:
        """Returns [1, length, width] a prompt, by the pipeline's own template and layers."""
        tokenizer = load_part(Qwen2TokenizerFast, folder, "tokenizer")
        encoder = load_network(Qwen3ForCausalLM, folder, "text_encoder", self._dtype, self._device)
        return [
            Flux2KleinPipeline._get_qwen3_prompt_embeds(encoder, tokenizer, prompt, max_sequence_length=length)
            for prompt in prompts
        ]

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Encodes uint8 [B, 3, S, S] (0..255); returns the latents, flattened, float32 [B, embedding_dim] (CPU)."""
        pixels = (images.float() / 127.5 - 1).to(self._device, self._dtype)
        latents = self._vae.encode(pixels).latent_dist.mode()
        patches: torch.Tensor = (torch.nn.functional.pixel_unshuffle(latents, 2) - self._mean) / self._std
        return patches.float().flatten(1).cpu()

    def _bounds(self) -> dict[str, tuple[float, float]]:
        return super()._bounds() | ({"guidance_scale": (0, 1)} if self._distilled else {})

    def _condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.view(-1, self._channels, self._reference_side, self._reference_side)

    def _unconditioned(self, condition: torch.Tensor) -> torch.Tensor:
        # As in the stock pipeline, guidance compares with no prompt, not with no reference.
        return condition

    def _output(self, x: torch.Tensor, time: float, condition: torch.Tensor, own: Columns, free: int) -> torch.Tensor:
        prompts = [(self._empty, free), (self._given, len(x) - free)]
        text = torch.cat([prompt.expand(rows, -1, -1) for prompt, rows in prompts])
        made, reference = x.flatten(2).transpose(1, 2), condition.flatten(2).transpose(1, 2)
        side = x.shape[-1]
        positions = [
            _positions(0, side, side, 1),
            _positions(REFERENCE_TIME, self._reference_side, self._reference_side, 1),
        ]
        output = self._transformer(
            hidden_states=torch.cat([made, reference], dim=1),
            timestep=x.new_full((len(x),), time),
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=_positions(0, 1, 1, text.shape[1]).to(self._device)[None].expand(len(x), -1, -1),
            img_ids=torch.cat(positions).to(self._device)[None].expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        velocity: torch.Tensor = output[:, : made.shape[1]].transpose(1, 2).unflatten(2, (side, side))
        return velocity

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        unpacked = torch.nn.functional.pixel_shuffle(latents * self._std + self._mean, 2)
        images: torch.Tensor = self._vae.decode(unpacked, return_dict=False)[0]
        return images


def _positions(time: int, height: int, width: int, length: int) -> torch.Tensor:
    """Returns int64 [height * width * length, 4]: the positions (time, row, column, place in the text) of tokens."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(length))
