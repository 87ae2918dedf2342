"""The conditioner of the generators trained by genssl: a frozen self-supervised encoder from a generator's folder.

`encoder.safetensors` has the format of a run directory (`save_encoder`): the backbone's weights,
and in the metadata the config that rebuilds it. One key more, `image_size`, says what the encoder is shown.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from genssl.base.devices import seeded_initialisation
from genssl.base.files import write_atomically
from genssl.base.safetensors_file import read_tensors, write_tensors
from genssl.config.base import ComponentConfig
from genssl.data.base import UInt8Array
from genssl.data.decode import resize_and_crop
from genssl.errors import GeneratorError, UserError
from genssl.generators.finite import check_weights
from genssl.registry import BACKBONES

FORMAT = "genssl-encoder/1"
FILE = "encoder.safetensors"
CLIP = "image_encoder"  # the folder that a diffusers pipeline has in its place


class Conditioner:
    """Images to embeddings; float32, frozen, in evaluation mode (a row does not depend on its batch).

    Attributes:
        embedding_dim: width D of an embedding.
        image_size: side S of the images that `embed` takes.

    Args:
        backbone: maps float [B, 3, S, S] in [0, 1] to features float [B, D] and has the attribute `feature_dim`.
    """

    def __init__(self, backbone: nn.Module, image_size: int, device: torch.device) -> None:
        self._backbone = backbone.to(device).eval().requires_grad_(False)
        self._device = device
        self.embedding_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        self.image_size = image_size

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Conditioner:
        """Loads `encoder.safetensors` from a generator's folder; raises GeneratorError if it is missing or broken."""
        path = folder / FILE
        backbone, _, image_size = load_encoder(path)
        if image_size is None:
            raise GeneratorError(
                f"{path}: does not say its image size; encoders get it when `genssl train-generator` writes them"
            )
        return cls(backbone, image_size, device)

    def to(self, device: torch.device) -> None:
        """Moves the encoder to a device."""
        self._backbone.to(device)
        self._device = device

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Resizes and centre-crops uint8 [3, H, W] of any size to uint8 [3, S, S] (Pillow, bicubic, antialiased)."""
        return resize_and_crop(image, self.image_size)

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds preprocessed images uint8 [B, 3, S, S]; returns float32 [B, D] on the CPU, each row of length sqrt(D).

        Rows of length 1 would have components so small that a generator learns to ignore them (measured on the digits:
        an IC-GAN's label agreement 0.59 against 0.91).
        """
        features: torch.Tensor = self._backbone(images.to(self._device).float() / 255)
        return (F.normalize(features.float(), dim=1) * math.sqrt(self.embedding_dim)).cpu()


def save_encoder(path: Path, backbone: nn.Module, config: ComponentConfig, **facts: str) -> None:
    """Writes a backbone so that `Conditioner.load` and `genssl.encoders.load` rebuild it.

    Args:
        path: of the file.
        backbone: its weights are written.
        config: what the backbone was built from.
        facts: for the file's metadata; a conditioner has `image_size`, the side of the images it was trained on.
    """
    metadata = {"backbone": config.model_dump_json(), **facts, "format": FORMAT}
    write_atomically(path, lambda partial: write_tensors(partial, backbone.state_dict(), metadata))


def has_own_encoder(folder: Path) -> bool:
    """Says whether a diffusers pipeline sees images with `encoder.safetensors` and not a CLIP; it must have one."""
    own, clip = (folder / FILE).is_file(), (folder / CLIP).is_dir()
    if own and clip:
        raise GeneratorError(
            f"{folder}: holds two image encoders, {CLIP}/ and {FILE}; delete the one that the denoiser was not "
            "trained with"
        )
    if not own and not clip:
        raise GeneratorError(
            f"{folder}: holds no image encoder, neither {CLIP}/ nor {FILE}; the folder is incomplete, get it "
            "again, or of a model without one"
        )
    return own


def load_encoder(path: Path) -> tuple[nn.Module, ComponentConfig, int | None]:
    """Reads the encoder of a run directory or of a generator's folder.

    Returns the backbone on the CPU, its config, and its image size if the file says it. Raises GeneratorError if it is
    missing, damaged, of another format, or not finite.
    """
    try:
        tensors, metadata = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise GeneratorError(f"{path}: cannot be read as safetensors ({error}); get the folder again") from None
    if metadata.get("format") != FORMAT:
        raise GeneratorError(
            f"{path}: is not an encoder of genssl (format {metadata.get('format')!r} instead of {FORMAT!r})"
        )
    try:
        block = json.loads(metadata["backbone"])
        config: ComponentConfig = BACKBONES.config(block["name"]).model_validate(block)
        with seeded_initialisation(
            "conditioner"
        ):  # the first weights are overwritten; the global stream stays as it is
            backbone: nn.Module = BACKBONES.get(config.name)(config)
        backbone.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, ValidationError, RuntimeError, UserError) as error:
        raise GeneratorError(f"{path}: the backbone cannot be rebuilt: {error}") from None
    check_weights(path, tensors)
    size = metadata.get("image_size", "")
    return backbone, config, int(size) if size.isdecimal() else None
