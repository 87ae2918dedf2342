"""What a Stable unCLIP sees images with: CLIP, or a self-supervised encoder of genssl in its place.

A model's folder has one of the two: `image_encoder/` with `feature_extractor/`, as diffusers writes them, or
`encoder.safetensors`, see `genssl.generators.conditioner`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import CLIPVisionConfig

from genssl.data.base import UInt8Array
from genssl.data.decode import resize_and_crop
from genssl.errors import GeneratorError
from genssl.generators.conditioner import CLIP, FILE, Conditioner, has_own_encoder
from genssl.generators.diffusion.foreground import foreground_ratio
from genssl.generators.diffusion.loading import image_encoder, load_part
from genssl.generators.fingerprint import Fingerprint, fingerprint_file, fingerprint_model, network_files
from genssl.generators.preprocessing import Rule, read_preprocessing


class ImageEncoder(Protocol):
    """A frozen encoder that can leave memory: once released, it is loaded again by the next `embed`.

    Attributes:
        embedding_dim: width D of an embedding.
    """

    embedding_dim: int

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings uint8 [3, H, W] of any size to uint8 [3, S, S]."""
        ...

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, D] on the CPU."""
        ...

    def fingerprint(self) -> Fingerprint:
        """Returns what names the encoder and its preprocessing."""
        ...

    def files(self) -> list[str]:
        """Returns what is loaded of the model's folder, relative to it."""
        ...

    def facts(self) -> list[str]:
        """Returns what else the name of a generator owes to the encoder."""
        ...

    def release(self) -> None:
        """Frees the network's memory."""
        ...


def open_image_encoder(
    folder: Path, dtype: torch.dtype, device: torch.device, *, lazy: bool, rule: Rule | None = None
) -> ImageEncoder:
    """Opens the image encoder of a Stable unCLIP's folder, of whichever kind it is.

    Args:
        folder: the model's.
        dtype: of a CLIP; an encoder of genssl is float32.
        device: where it runs.
        lazy: it is loaded when it is first needed, and not now, when its faults would show.
        rule: of a CLIP's preprocessing, see `read_preprocessing`.

    Raises:
        GeneratorError: if the folder has none or both, or the one that it has is broken or has no such rule.
    """
    if not has_own_encoder(folder):
        return CLIPEncoder(folder, dtype, device, lazy=lazy, rule=rule)
    if rule is not None:
        raise GeneratorError(
            f"generator.preprocess: {folder} sees images with an encoder of genssl and not with a CLIP; leave "
            "preprocess out, or set it to null beside a preset"
        )
    return SelfSupervisedEncoder(folder, device, lazy=lazy)


class CLIPEncoder:
    """The CLIPVisionModelWithProjection in `image_encoder/`; see `ImageEncoder` and `open_image_encoder`."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, lazy: bool, rule: Rule | None = None
    ) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._preprocessing = read_preprocessing(folder, rule=rule)
        self._network: Any = None if lazy else image_encoder(folder, dtype, device)[0]
        self.embedding_dim = int(load_part(CLIPVisionConfig, folder, CLIP).projection_dim)

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """See `ImageEncoder`."""
        return self._preprocessing.preprocess(image)

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """See `ImageEncoder`; embeddings are not normalised."""
        embeddings: torch.Tensor = self._forward(images).image_embeds
        return embeddings.float().cpu()

    @torch.inference_mode()
    def embed_with_foreground(self, images: torch.Tensor) -> torch.Tensor:
        """Returns what `embed` does and, as column [D], the part of each image that is foreground."""
        output = self._forward(images)
        foreground = foreground_ratio(output.last_hidden_state[:, 1:])  # without the class token
        return torch.cat([output.image_embeds.float().cpu(), foreground[:, None]], dim=1)

    def fingerprint(self) -> Fingerprint:
        """See `ImageEncoder`."""
        version, told = self._preprocessing.encoder_facts()
        folder = self._folder / CLIP
        return fingerprint_model(folder, network_files(folder), version, str(self._dtype), told)

    def files(self) -> list[str]:
        """See `ImageEncoder`."""
        return [*network_files(self._folder, CLIP), "feature_extractor/preprocessor_config.json"]

    def facts(self) -> list[str]:
        """See `ImageEncoder`."""
        return self._preprocessing.facts()

    def release(self) -> None:
        """See `ImageEncoder`."""
        self._network = None

    def _forward(self, images: torch.Tensor) -> Any:
        if self._network is None:
            self._network, _ = image_encoder(self._folder, self._dtype, self._device)
        return self._network(self._preprocessing.normalise(images).to(self._device, self._dtype))


class SelfSupervisedEncoder:
    """The `Conditioner` in `encoder.safetensors`; see `ImageEncoder` and `open_image_encoder`.

    It has no `embed_with_foreground`: its backbone returns one feature an image, and no map of them.
    """

    def __init__(self, folder: Path, device: torch.device, *, lazy: bool) -> None:
        self._folder, self._device = folder, device
        # Nothing but the backbone says how wide it is. If it is not to stay, it need not go to the device for that.
        loaded = Conditioner.load(folder, torch.device("cpu") if lazy else device)
        self.embedding_dim, self._image_size = loaded.embedding_dim, loaded.image_size
        self._conditioner: Conditioner | None = None if lazy else loaded

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """See `ImageEncoder`; as `Conditioner.preprocess`."""
        return resize_and_crop(image, self._image_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """See `ImageEncoder`; embeddings have length sqrt(D)."""
        if self._conditioner is None:
            self._conditioner = Conditioner.load(self._folder, self._device)
        return self._conditioner.embed(images)

    def fingerprint(self) -> Fingerprint:
        """See `ImageEncoder`; a flow of the same encoder has the same."""
        digest = fingerprint_file(self._folder / FILE)
        return Fingerprint(digest, lambda: digest)

    def files(self) -> list[str]:
        """See `ImageEncoder`."""
        return [FILE]

    def facts(self) -> list[str]:
        """See `ImageEncoder`."""
        return []

    def release(self) -> None:
        """See `ImageEncoder`."""
        self._conditioner = None
