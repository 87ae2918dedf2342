"""A rectified flow from noise to images or latents, conditioned on self-supervised features.

The network predicts the velocity v = x1 - x0 on the straight line x_t = (1 - t) x0 + t x1 from noise x0 to the image x1
(Liu et al. 2022, arXiv 2209.03003; conditioning on frozen features as in RCG, Li et al. 2023, arXiv 2312.03701), and
Euler steps follow it from t = 0 to t = 1. It is told how much noise lies on the embedding, as unCLIP's is. A distilled
flow, a student, has learnt one number of steps, often 1 (`genssl.generator_training.distill`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError

from genssl.base.safetensors_file import read_tensors
from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Alive, GeneratorSpec
from genssl.generators.conditioner import FILE, Conditioner
from genssl.generators.configs import FlowConfig
from genssl.generators.cost import count_tflops
from genssl.generators.diffusion.loading import load_network
from genssl.generators.diffusion.sampling import decode, denoise, guidance_column, guide, row_noise, spread
from genssl.generators.fingerprint import fingerprint_file, fingerprint_model, network_files
from genssl.generators.finite import check_weights
from genssl.generators.models import OWN, find_trained, read_json
from genssl.generators.parameters import Parameters

SAMPLER_VERSION = "flow/1"
CLASS = "GensslFlow"
WEIGHTS, VAE = "unet.safetensors", "vae"
DEFAULT_STEPS = 4
NORM_GROUPS = 8
TIME_SCALE = 1000  # the UNet's sinusoidal time embedding expects 0..1000


class Flow:
    """A flow of genssl on one device.

    Args:
        config: names the model and gives the default parameters.
        device: where the networks run.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or is incomplete.
    """

    def __init__(self, config: FlowConfig, device: torch.device) -> None:
        folder = find_trained(config.model, CLASS)
        parts = FlowParts.load(folder)
        facts = parts.facts
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        parts.to(device, self._dtype)
        self._conditioner, self._network, self._vae = parts.conditioner, parts.network, parts.autoencoder
        self._conditioner_fingerprint = fingerprint_file(folder / FILE)
        self._max_noise = float(facts["max_embedding_noise"])
        self._student_steps: int | None = facts.get("student_steps")
        self._shape = latent_shape(facts)
        card = folder / "card.json"
        licence = read_json(card).get("licence") if card.exists() else None
        files = [OWN, WEIGHTS, FILE, *(network_files(folder, VAE) if self._vae is not None else [])]
        fingerprint = fingerprint_model(folder, files, SAMPLER_VERSION, config.dtype, keep_order=[OWN])
        self.spec = GeneratorSpec(
            name=config.name,
            model=config.model,
            fingerprint=fingerprint.digest,
            former=fingerprint.former,
            embedding_dim=self._conditioner.embedding_dim,
            image_size=int(facts["image_size"]),
            licence=licence or "unknown (the folder has no card.json)",
            settings={"dtype": config.dtype},
            defaults={
                "num_inference_steps": config.num_inference_steps or self._student_steps or DEFAULT_STEPS,
                "guidance_scale": config.guidance_scale,
                "embedding_noise": config.embedding_noise,
            },
        )
        try:
            self.check(self.spec.defaults)
        except RequestRefusedError as error:
            raise GeneratorError(f"generator {config.model}: {error}") from None
        self.spec = replace(self.spec, tflops=self._tflops())

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Resizes and centre-crops uint8 [3, H, W] of any size to the encoder's input size."""
        return self._conditioner.preprocess(image)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S]; returns float32 [B, embedding_dim] of length sqrt(embedding_dim), on the CPU."""
        return self._conditioner.embed(images)

    def conditioner_fingerprint(self) -> bytes:
        """Returns 16 bytes that name the conditioner alone."""
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
        bounds = {
            "num_inference_steps": (1, 1000),
            "guidance_scale": (0, 100),
            "embedding_noise": (0, self._max_noise),
        }
        for name, (low, high) in bounds.items():
            if not low <= parameters[name] <= high:
                trained = ", the noise that it was trained with" if name == "embedding_noise" else ""
                raise RequestRefusedError(f"parameter {name}: {parameters[name]} is outside {low}..{high:g}{trained}")

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """Steps must agree within a batch, and guided rows go apart since they cost two forwards."""
        return (parameters["num_inference_steps"], parameters["guidance_scale"] > 1)

    @torch.inference_mode()
    def generate(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        """Makes one image a row; see `Generator.generate`."""
        shared = parameters[0]
        embedding_noise, noise = row_noise(seeds, (embeddings.shape[1],), self._shape)
        levels = torch.tensor([float(row["embedding_noise"]) for row in parameters])
        condition = noise_embeddings(embeddings.float(), embedding_noise, levels).to(self._device)
        x = noise.to(self._device)  # float32 throughout; the networks alone run in the config's dtype
        steps, guided = int(shared["num_inference_steps"]), bool(shared["guidance_scale"] > 1)

        def advance(step: int, x: torch.Tensor, condition: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
            return x + self._velocity(x, step / steps, condition, guidance if guided else None) / steps

        x, rows = denoise(range(steps), [x, condition, guidance_column(parameters, x)], advance, alive, sizes)
        made = decode(
            self._pixels, x, self.spec.image_size, self.spec.image_size, whose=self.spec.title, dtype=self._dtype
        )
        return spread(made, rows, len(embeddings))

    def _pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Returns images [B, 3, S, S] in about -1..1 of where the flow has ended."""
        if self._vae is None:
            return x
        scaled = (x / self._vae.config["scaling_factor"]).to(self._dtype)
        images: torch.Tensor = self._vae.decode(scaled, return_dict=False)[0]
        return images

    def _tflops(self) -> float:
        """Returns what a variant costs at the defaults, see `GeneratorSpec.tflops`."""
        width, defaults = self.spec.embedding_dim + 1, self.spec.defaults
        x = torch.zeros((1, *self._shape), device="meta", dtype=self._dtype)
        forward = count_tflops(
            self._network,
            x,
            torch.zeros(1, device="meta"),
            encoder_hidden_states=None,
            class_labels=torch.zeros((1, width), device="meta", dtype=self._dtype),
        )
        steps: float = forward * defaults["num_inference_steps"] * (2 if defaults["guidance_scale"] > 1 else 1)
        return steps if self._vae is None else steps + count_tflops(self._vae.decoder, x)

    def _velocity(
        self, x: torch.Tensor, time: float, condition: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the velocity float32 [B, C, h, w], guided row by row if `guidance` [B, 1, 1, 1] is given."""
        if guidance is not None:
            x, condition = torch.cat([x, x]), torch.cat([torch.zeros_like(condition), condition])
        times = torch.full((len(x),), time, device=self._device)
        output = velocity(self._network, x.to(self._dtype), times, condition.to(self._dtype)).float()
        return output if guidance is None else guide(output, guidance)


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
    """A flow's networks, frozen and in evaluation mode.

    Attributes:
        folder: of the model.
        facts: its config.json.
        conditioner: makes embeddings.
        network: the velocity.
        autoencoder: of a flow of latents.
    """

    folder: Path
    facts: dict[str, Any]
    conditioner: Conditioner
    network: torch.nn.Module
    autoencoder: AutoencoderKL | None

    @classmethod
    def load(cls, folder: Path) -> FlowParts:
        """Loads a flow's folder to the CPU, float32.

        Raises:
            GeneratorError: if it is incomplete, or its files belong to different models.
        """
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
