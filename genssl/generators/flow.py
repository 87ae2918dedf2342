"""A rectified flow from noise to images, conditioned on self-supervised features.

The network predicts the velocity v = x1 - x0 on the straight line x_t = (1 - t) x0 + t x1 from noise x0 to the image x1
(Liu et al. 2022, arXiv 2209.03003; conditioning on frozen features as in RCG, Li et al. 2023, arXiv 2312.03701), and
Euler steps follow it from t = 0 to t = 1. It is told how much noise lies on the embedding, as unCLIP's is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Alive, GeneratorSpec, Parameters, keep_living
from genssl.generators.conditioner import FILE, Conditioner
from genssl.generators.configs import FlowConfig
from genssl.generators.cost import count_tflops
from genssl.generators.fingerprint import fingerprint_folder
from genssl.generators.locate import find_trained, read_json

SAMPLER_VERSION = "flow/1"
CLASS = "GensslFlow"
WEIGHTS = "unet.safetensors"
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
        facts = read_json(folder / "config.json")
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._conditioner = Conditioner.load(folder, device)
        self._conditioner_fingerprint = hashlib.blake2b((folder / FILE).read_bytes(), digest_size=16).digest()
        network = _load_network(folder, facts)
        # The plain method: diffusers' own warns of parts that must stay in float32, of which this network has none.
        self._network = torch.nn.Module.to(network, device, self._dtype).eval().requires_grad_(False)
        self._max_noise = float(facts["max_embedding_noise"])
        if facts["embedding_dim"] != self._conditioner.embedding_dim:
            raise GeneratorError(
                f"{folder}: the network takes embeddings of {facts['embedding_dim']} numbers, the encoder makes "
                f"{self._conditioner.embedding_dim}; the files belong to different models"
            )
        card = folder / "card.json"
        licence = read_json(card).get("licence") if card.exists() else None
        self.spec = GeneratorSpec(
            name=config.name,
            model=config.model,
            fingerprint=fingerprint_folder(folder, SAMPLER_VERSION, config.dtype),
            embedding_dim=self._conditioner.embedding_dim,
            image_size=int(facts["image_size"]),
            licence=licence or "unknown (the folder has no card.json)",
            settings={"dtype": config.dtype},
            defaults={
                "num_inference_steps": config.num_inference_steps,
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
        shared, side = parameters[0], self.spec.image_size
        embedding_noise, noise = [], []
        for seed in seeds:
            stream = torch.Generator("cpu").manual_seed(seed)
            embedding_noise.append(torch.randn((1, embeddings.shape[1]), generator=stream))
            noise.append(torch.randn((1, 3, side, side), generator=stream))
        levels = torch.tensor([float(row["embedding_noise"]) for row in parameters])
        condition = noise_embeddings(embeddings.float(), torch.cat(embedding_noise), levels).to(self._device)
        guidance = torch.tensor([float(row["guidance_scale"]) for row in parameters], device=self._device)
        guidance = guidance.view(-1, 1, 1, 1)
        guided = bool(shared["guidance_scale"] > 1)
        x = torch.cat(noise).to(self._device)  # float32 throughout; the network alone runs in the config's dtype
        rows_left = list(range(len(x)))
        steps = int(shared["num_inference_steps"])
        for step in range(steps):
            kept = None if alive is None else keep_living(alive(), rows_left, sizes)
            if kept is not None:
                x, condition, guidance = x[kept], condition[kept], guidance[kept]
                rows_left = [rows_left[position] for position in kept]
            x = x + self._velocity(x, step / steps, condition, guidance if guided else None) / steps
        made = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        if len(made) == len(embeddings):
            return made
        spread = made.new_zeros((len(embeddings), *made.shape[1:]))
        spread[rows_left] = made
        return spread

    def _tflops(self) -> float:
        """Returns what a variant costs at the defaults, see `GeneratorSpec.tflops`."""
        side, width, defaults = self.spec.image_size, self.spec.embedding_dim + 1, self.spec.defaults
        forward = count_tflops(
            self._network,
            torch.zeros((1, 3, side, side), device="meta", dtype=self._dtype),
            torch.zeros(1, device="meta"),
            encoder_hidden_states=None,
            class_labels=torch.zeros((1, width), device="meta", dtype=self._dtype),
        )
        return forward * defaults["num_inference_steps"] * (2 if defaults["guidance_scale"] > 1 else 1)

    def _velocity(
        self, x: torch.Tensor, time: float, condition: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the velocity float32 [B, 3, S, S], guided row by row if `guidance` [B, 1, 1, 1] is given."""
        if guidance is not None:
            x, condition = torch.cat([x, x]), torch.cat([torch.zeros_like(condition), condition])
        times = torch.full((len(x),), time, device=self._device)
        output = velocity(self._network, x.to(self._dtype), times, condition.to(self._dtype)).float()
        if guidance is None:
            return output
        free, conditioned = output.chunk(2)
        return free + guidance * (conditioned - free)


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


def velocity(
    network: UNet2DConditionModel, x: torch.Tensor, times: torch.Tensor, condition: torch.Tensor
) -> torch.Tensor:
    """Returns the network's velocity [B, 3, S, S] at x [B, 3, S, S] (images in -1..1), times [B] in 0..1."""
    output: torch.Tensor = network(
        x, times * TIME_SCALE, encoder_hidden_states=None, class_labels=condition, return_dict=False
    )[0]
    return output


def build_network(facts: dict[str, Any]) -> UNet2DConditionModel:
    """Returns the UNet that a model's config.json describes, with weights from torch's current random stream."""
    channels = tuple(facts["block_out_channels"])
    return UNet2DConditionModel(
        sample_size=facts["image_size"],
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=channels,
        layers_per_block=facts["layers_per_block"],
        norm_num_groups=NORM_GROUPS,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=facts["embedding_dim"] + 1,
        cross_attention_dim=NORM_GROUPS,  # no block attends to a text; the class wants a number
        attention_head_dim=4,
    )


def _load_network(folder: Path, facts: dict[str, Any]) -> UNet2DConditionModel:
    path = folder / WEIGHTS
    try:
        with torch.random.fork_rng(devices=[]):  # the first weights are overwritten; the global stream stays as it is
            network = build_network(facts)
        network.load_state_dict(load_file(path))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise GeneratorError(
            f"{path}: does not fit {folder / 'config.json'} ({error}); the folder is incomplete, get it again"
        ) from None
    return network
