"""The conditioner of a generator as an encoder, such as the CLIP that Stable unCLIP sees images with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genssl.errors import GeneratorError
from genssl.generators.conditioner import FILE as OWN_ENCODER
from genssl.generators.conditioner import has_own_encoder
from genssl.generators.conditioner import load_encoder as load_own
from genssl.generators.icgan.official import FILE as RESNET
from genssl.generators.icgan.official import MEAN, NETWORK_SIZE, STD, load_resnet
from genssl.generators.models import BUILTIN, DIFFUSERS, builtin_models, read_json

Statistics = tuple[Sequence[float], Sequence[float]]
PREFIX = "builtin:"


def is_generator(name: str) -> bool:
    """Says whether a name is that of a built-in generator, or of a folder that holds one with a conditioner."""
    folder = Path(name).expanduser()
    return name.startswith(PREFIX) or (folder / DIFFUSERS).is_file() or (folder / RESNET).is_file()


def load_conditioner(name: str) -> tuple[nn.Module, int | None, Statistics, dict[str, Any]]:
    """Loads what a generator embeds images with; the rest of it is not read.

    Args:
        name: `builtin:NAME`, or the folder of a Stable unCLIP, a flow or an IC-GAN.

    Returns:
        The network on the CPU, which maps normalised images [B, 3, S, S] to embeddings [B, D] (of any length, as they
        come); S; mean and deviation of the normalisation; and facts for provenance.

    Raises:
        GeneratorError: if there is no such generator, or it has no image encoder.
    """
    folder = Path(name).expanduser()
    if name.startswith(PREFIX):
        known = sorted({*builtin_models(), *builtin_models("config.json")})
        if name.removeprefix(PREFIX) not in known:
            raise GeneratorError(f"{name}: there is no such built-in generator; there are {', '.join(known)}")
        folder = BUILTIN / name.removeprefix(PREFIX)
    source: dict[str, Any] = {"kind": "generator", "path": name}
    if (folder / DIFFUSERS).is_file():
        from genssl.generators.diffusion.loading import image_encoder  # diffusers takes seconds
        from genssl.generators.diffusion.stable_unclip import PIPELINE

        found = read_json(folder / DIFFUSERS).get("_class_name")
        if found != PIPELINE:
            raise GeneratorError(f"{folder}: the model is a {found}; the conditioner of a {PIPELINE} can be compared")
        if not has_own_encoder(folder):
            network, preprocessing = image_encoder(folder, torch.float32, torch.device("cpu"))
            return _Embeds(network), preprocessing.size, (preprocessing.mean, preprocessing.std), source
    if (folder / OWN_ENCODER).is_file():
        backbone, config, image_size = load_own(folder / OWN_ENCODER)
        source["backbone"] = config.model_dump(mode="json")
        return backbone, image_size, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), source
    return load_resnet(folder), NETWORK_SIZE, (MEAN, STD), source


class _Embeds(nn.Module):
    """Takes the projected embedding out of what a CLIP image encoder returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.network(images).image_embeds
        return embeddings
