"""A rectified flow from noise to images or latents, conditioned on self-supervised features.

The network predicts the velocity v = x1 - x0 on the straight line x_t = (1 - t) x0 + t x1 from noise x0 to the image x1
(Liu et al. 2022, arXiv 2209.03003; conditioning on frozen features as in RCG, Li et al. 2023, arXiv 2312.03701), and
Euler steps follow it from t = 0 to t = 1. It is told how much noise lies on the embedding, as unCLIP's is. A distilled
flow, a student, has learnt one number of steps, often 1 (`genssl.generator_training.distill`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError

from genssl.base.safetensors_file import read_tensors
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.conditioner import FILE, Conditioner
from genssl.generators.configs import FlowConfig
from genssl.generators.diffusion.guided import Columns, GuidedDiffusion
from genssl.generators.diffusion.loading import load_network
from genssl.generators.diffusion.sampling import Sampler
from genssl.generators.fingerprint import fingerprint_file, fingerprint_model, network_files
from genssl.generators.finite import check_weights
from genssl.generators.models import OWN, find_trained, licence_of, read_json
from genssl.generators.parameters import Parameters

SAMPLER_VERSION = "flow/1"
CLASS = "GensslFlow"
WEIGHTS, VAE = "unet.safetensors", "vae"
DEFAULT_STEPS = 4
NORM_GROUPS = 8
TIME_SCALE = 1000  # the UNet's sinusoidal time embedding expects 0..1000


@dataclass(frozen=True)
class Step:
    """One of `count` Euler steps, from the time `timestep` (0..1) on."""

    timestep: float
    count: int


class Euler(Sampler):
    """Euler steps of equal length."""

    def steps(self, count: int, side: int = 0) -> list[Step]:
        """Returns the `count` steps from noise to image."""
        return [Step(number / count, count) for number in range(count)]

    def move(
        self, step: Step, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Moves latents along the network's velocity."""
        return latents + output / step.count


class Flow(GuidedDiffusion):
    """A flow of genssl on one device.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or is incomplete.
    """

    BY_ROW = ("guidance_scale", "embedding_noise")
    NOISE = "embedding_noise"
    _notes: Mapping[str, str] = {"embedding_noise": ", the noise that it was trained with"}

    def __init__(self, config: FlowConfig, device: torch.device) -> None:
        folder = find_trained(config.model, CLASS)
        parts = FlowParts.load(folder)
        facts = parts.facts
        channels, side, _ = latent_shape(facts)
        image_size = int(facts["image_size"])
        super().__init__(config, device, sampler=Euler(), channels=channels, scale=image_size // side)
        self._latent_dtype = torch.float32  # the networks alone run in the config's dtype
        parts.to(device, self._dtype)
        self._encoder, self._network, self._vae = parts.conditioner, parts.network, parts.autoencoder
        self._conditioner_fingerprint = fingerprint_file(folder / FILE)
        self._max_noise = float(facts["max_embedding_noise"])
        self._student_steps: int | None = facts.get("student_steps")
        self._shape = latent_shape(facts)
        files = [OWN, WEIGHTS, FILE, *(network_files(folder, VAE) if self._vae is not None else [])]
        self._describe(
            config,
            fingerprint_model(folder, files, SAMPLER_VERSION, config.dtype, keep_order=[OWN]),
            image_size=image_size,
            licence=licence_of(folder, "unknown (the folder has no card.json)"),
            settings={"dtype": config.dtype},
            defaults={
                "num_inference_steps": config.num_inference_steps or self._student_steps or DEFAULT_STEPS,
                "guidance_scale": config.guidance_scale,
                "embedding_noise": config.embedding_noise,
            },
        )

    def conditioner_fingerprint(self) -> bytes:
        """See `HasConditionerFingerprint`."""
        return self._conditioner_fingerprint

    def check(self, parameters: Parameters) -> None:
        """Raises RequestRefusedError for steps, guidance or noise outside what the model can do."""
        steps = parameters["num_inference_steps"]
        if self._student_steps is not None and steps != self._student_steps:
            raise RequestRefusedError(
                f"parameter num_inference_steps: {steps}, but the model was distilled to {self._student_steps}; leave "
                "it out"
            )
        if self._student_steps is not None and parameters["guidance_scale"] > 1:
            raise RequestRefusedError(
                "parameter guidance_scale: the model was distilled with its teacher's guidance built in; leave it out"
            )
        super().check(parameters)

    def _bounds(self) -> dict[str, tuple[float, float]]:
        return {
            "num_inference_steps": (1, 1000),
            "guidance_scale": (0, 100),
            "embedding_noise": (0, self._max_noise),
        }

    def _latent_shape(self, parameters: Parameters) -> tuple[int, int, int]:
        return self._shape

    def _noised(self, embeddings: torch.Tensor, noise: torch.Tensor, levels: list[float | int]) -> torch.Tensor:
        return noise_embeddings(embeddings, noise, torch.tensor([float(level) for level in levels]))

    def _output(self, x: torch.Tensor, time: float, condition: torch.Tensor, own: Columns, free: int) -> torch.Tensor:
        times = torch.full((len(x),), time, device=self._device)
        return velocity(self._network, x.to(self._dtype), times, condition.to(self._dtype)).float()

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents if self._vae is None else super()._decode(latents)

    def _costly_decode(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = latents if self._vae is None else self._vae.decoder(latents.to(self._dtype))
        return decoded


def noise_embeddings(embeddings: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Mixes noise into embeddings, keeps their length in the mean, and appends the level; shared with the trainer.

    Args:
        embeddings, noise: float32 [B, D]; components of both are about 1.
        levels: float32 [B] >= 0; at 1 half of what the network sees is noise.

    Returns:
        float32 [B, D + 1], the network's condition; all zeros stand for "no embedding".
    """
    levels = levels.view(-1, 1)
    return torch.cat([(embeddings + levels * noise) / (1 + levels**2).sqrt(), levels], dim=1)


def velocity(network: torch.nn.Module, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
    """Returns the network's velocity at x, both [B, C, h, w] (images in -1..1, or latents), and times [B] in 0..1."""
    output: torch.Tensor = network(
        x, times * TIME_SCALE, encoder_hidden_states=None, class_labels=condition, return_dict=False
    )[0]
    return output


def latent_shape(facts: dict[str, Any]) -> tuple[int, int, int]:
    """Returns (C, h, w) of what the flow moves: pixels, or the latents of its autoencoder."""
    latents = facts.get("latents", {"channels": 3, "size": facts["image_size"]})
    return latents["channels"], latents["size"], latents["size"]


def build_network(facts: dict[str, Any]) -> UNet2DConditionModel:
    """Returns the UNet that a model's config.json describes, with weights from torch's current random stream."""
    blocks = tuple(facts["block_out_channels"])
    channels, side, _ = latent_shape(facts)
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D",) * len(blocks),
        up_block_types=("UpBlock2D",) * len(blocks),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=blocks,
        layers_per_block=facts["layers_per_block"],
        norm_num_groups=NORM_GROUPS,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=facts["embedding_dim"] + 1,
        cross_attention_dim=NORM_GROUPS,  # no block attends to a text; the class wants a number
        attention_head_dim=4,
    )


@dataclass
class FlowParts:
    """A flow's frozen networks, in evaluation mode, and its config.json; without an autoencoder if it makes pixels."""

    folder: Path
    facts: dict[str, Any]
    conditioner: Conditioner
    network: torch.nn.Module
    autoencoder: AutoencoderKL | None

    @classmethod
    def load(cls, folder: Path) -> FlowParts:
        """Loads a flow's folder to the CPU, float32; raises GeneratorError if its files do not fit."""
        facts, cpu = read_json(folder / "config.json"), torch.device("cpu")
        conditioner = Conditioner.load(folder, cpu)
        network = _load_network(folder, facts).eval().requires_grad_(False)
        if facts["embedding_dim"] != conditioner.embedding_dim:
            raise GeneratorError(
                f"{folder}: the network takes embeddings of {facts['embedding_dim']} numbers, the encoder makes "
                f"{conditioner.embedding_dim}; the files belong to different models"
            )
        autoencoder = None
        if "latents" in facts:
            autoencoder = load_network(AutoencoderKL, folder, VAE, torch.float32, cpu)
            if (found := autoencoder.config["latent_channels"]) != (wanted := facts["latents"]["channels"]):
                raise GeneratorError(
                    f"{folder}: the autoencoder decodes {found} channels and the network makes {wanted}; the files "
                    "belong to different models"
                )
        return cls(folder, facts, conditioner, network, autoencoder)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Moves all to a device, and the network and the autoencoder, not the conditioner, to a dtype."""
        self.conditioner.to(device)
        for network in (self.network, self.autoencoder):
            if network is not None:
                # The plain method: diffusers' own warns of parts that must stay in float32, of which there are none.
                torch.nn.Module.to(network, device, dtype)


def _load_network(folder: Path, facts: dict[str, Any]) -> UNet2DConditionModel:
    path = folder / WEIGHTS
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights are overwritten; the global stream stays as it is
            network = build_network(facts)
        weights = read_tensors(path)[0]
        network.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise GeneratorError(
            f"{path}: does not fit {folder / 'config.json'} ({error}); the folder is incomplete, get it again"
        ) from None
    check_weights(path, weights)
    return network
