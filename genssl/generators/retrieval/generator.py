"""Retrieval: no model makes the variants, they are other images of a bank, near the source in a feature space.

The control for every generator: whether generated variants help more than real neighbours do (Burg et al. 2023,
arXiv 2304.10253, for classifiers; NNCLR, 2104.14548, for neighbours as positives).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from genssl.base.devices import seeded_initialisation
from genssl.config.base import ComponentConfig
from genssl.data.decode import decode, resize_and_crop
from genssl.errors import GeneratorError
from genssl.generators.base import DescribedGenerator
from genssl.generators.conditioner import FILE, Conditioner, has_own_encoder, load_encoder
from genssl.generators.configs import RetrievalConfig
from genssl.generators.finite import check_weights
from genssl.generators.models import BUILTIN, DIFFUSERS
from genssl.generators.parameters import Parameters
from genssl.generators.preprocessing import Preprocessing
from genssl.generators.retrieval.bank import open_bank
from genssl.registry import BACKBONES

SAMPLER_VERSION = "retrieval/1"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DEFAULT_SIZE = 224


class Retrieval(DescribedGenerator):
    """A bank of images and the encoder that finds neighbours in it.

    Raises:
        GeneratorError: if the encoder cannot be had, or its embeddings were kept for another one.
        DataError: if the bank's images cannot be had.
    """

    _notes: Mapping[str, str] = {"neighbours": ", the bank's images without the source"}

    def __init__(self, config: RetrievalConfig, device: torch.device) -> None:
        bank_size = int(getattr(config.bank.images, "image_size", None) or 0)
        backbone, said, clip = _backbone(config.encoder)
        size = config.encoder_size or said or bank_size or DEFAULT_SIZE
        self._encoder = Conditioner(backbone, size, device)
        # A CLIP is shown sources as in its pipeline; of another size than there, the smaller side is resized to it.
        if clip is not None:
            clip = clip if clip.size == size else replace(clip, size=size, resize=size)
            self.preprocess = clip.preprocess  # type: ignore[method-assign]
        encoder = _digest(backbone, size, clip.encoder_facts() if clip is not None and clip.facts() else [])
        self._bank = open_bank(config.bank, self.preprocess, self.embed, encoder, device)
        self._size = config.output_size or self._bank.dataset.image_size
        name = config.encoder if isinstance(config.encoder, str) else config.encoder.name
        facts = (SAMPLER_VERSION, encoder.hex(), self._bank.digest.hex(), str(self._size))
        self._describe(
            config,
            hashlib.blake2b("\n".join(facts).encode(), digest_size=16).digest(),
            model=f"{len(self._bank)} images of {config.bank.images.name}, by {name}",
            image_size=self._size,
            licence="that of the bank's images",
            settings={"output_size": str(config.output_size)},
            defaults={"neighbours": config.neighbours},
        )

    def _bounds(self) -> dict[str, tuple[float, float]]:
        return {"neighbours": (1, len(self._bank) - 1)}

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """All rows can share a batch."""
        return ()

    def generate(
        self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Sequence[Parameters], **hooks: Any
    ) -> torch.Tensor:
        """Takes one of the nearest images a row, drawn by its seed; see `Generator.generate`."""
        images = []
        for embedding, seed, row in zip(embeddings, seeds, parameters, strict=True):
            image = self._bank.drawn(embedding, int(row["neighbours"]), seed)
            pixels = resize_and_crop(decode(self._bank.dataset.stored(image)), self._size)
            images.append(torch.from_numpy(pixels.copy()))
        return torch.stack(images)


class _Normalised(nn.Module):
    """A network of another library: takes images in [0, 1], normalises them, and returns one tensor [B, D]."""

    def __init__(self, network: nn.Module, feature_dim: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.feature_dim = network, feature_dim
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network((images - cast(torch.Tensor, self.mean)) / cast(torch.Tensor, self.std))
        features: torch.Tensor = getattr(output, "image_embeds", output)
        return features


def _backbone(encoder: str | ComponentConfig) -> tuple[nn.Module, int | None, Preprocessing | None]:
    """Returns a network for images in [0, 1] with the attribute `feature_dim`, its image size, and a CLIP's rule."""
    if isinstance(encoder, ComponentConfig):
        if getattr(encoder, "weights", None) is None:
            raise GeneratorError(
                f"generator.encoder: {encoder.name} has random weights; give `weights`, a safetensors file (timm's "
                "models take one), or a run directory, whose encoder is trained"
            )
        with seeded_initialisation("conditioner"):
            built: nn.Module = BACKBONES.get(encoder.name)(encoder)
        check_weights(f"generator.encoder: {encoder.name}", built.state_dict())
        network = _Normalised(built, int(built.feature_dim), *IMAGENET)  # type: ignore[arg-type]
        return network, getattr(encoder, "image_size", None), None
    path = Path(encoder).expanduser()
    if encoder.startswith("builtin:"):
        path = BUILTIN / encoder.removeprefix("builtin:")
    if (path / DIFFUSERS).is_file() and not has_own_encoder(path):
        from genssl.generators.diffusion.loading import image_encoder  # diffusers takes seconds

        vision, clip = image_encoder(path, torch.float32, torch.device("cpu"))
        return _Normalised(vision, int(vision.config.projection_dim), clip.mean, clip.std), clip.size, clip
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise GeneratorError(
            f"generator.encoder: {encoder!r} is not a run directory, encoder.safetensors or generator (a folder with "
            f"an encoder, or builtin:NAME), nor a backbone's block; {file} does not exist"
        )
    backbone, _, size = load_encoder(file)
    return backbone, size, None


def _digest(backbone: nn.Module, size: int, facts: Sequence[str]) -> bytes:
    """Returns 16 bytes over the encoder's weights, the size of what it is shown, and what else there is to tell."""
    digest = hashlib.blake2b(":".join([type(backbone).__name__, str(size), *facts]).encode(), digest_size=16)
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()
