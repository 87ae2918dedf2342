"""What a Stable unCLIP sees images with: CLIP, or a self-supervised encoder of genssl in its place.

A model's folder has one of the two: `image_encoder/` with `feature_extractor/`, as diffusers writes them, or
`encoder.safetensors`, see `genssl.generators.conditioner`. Each can leave memory, and is loaded again by the next
`embed`; it says by `files` and `facts` what the name of a generator owes to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig

from genssl.data.base import UInt8Array
from genssl.data.decode import resize_and_crop
from genssl.errors import GeneratorError
from genssl.generators.conditioner import CLIP, FILE, Conditioner, has_own_encoder
from genssl.generators.diffusion.loading import image_encoder, load_part
from genssl.generators.fingerprint import Fingerprint, fingerprint_file, fingerprint_model, network_files
from genssl.generators.preprocessing import Rule, read_preprocessing

FOREGROUND = 0.5  # of the scaled component, from which on a patch is foreground


class CLIPEncoder:
    """The CLIPVisionModelWithProjection in `image_encoder/` of a pipeline's folder; see `ImageEncoder`.

    If `lazy`, it is loaded when it is first needed, and not now, when its faults would show. The sub-folder `processor`
    and the `rule` say how it is shown a source, see `read_preprocessing`.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        lazy: bool = False,
        processor: str = "feature_extractor",
        rule: Rule | None = None,
    ) -> None:
        self._folder, self._dtype, self._device, self._processor = folder, dtype, device, processor
        self.preprocessing = read_preprocessing(folder, processor, rule)
        self.preprocess, self.facts = self.preprocessing.preprocess, self.preprocessing.facts
        self._network: Any = None
        if not lazy:
            self.network()
        self.embedding_dim = int(load_part(CLIPVisionConfig, folder, CLIP).projection_dim)

    def network(self) -> Any:
        """Returns the network, loaded if it is not there."""
        if self._network is None:
            self._network, _ = image_encoder(self._folder, self._dtype, self._device, self._processor)
        return self._network

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, D], not normalised, on the CPU."""
        embeddings: torch.Tensor = self._forward(images).image_embeds
        return embeddings.float().cpu()

    @torch.inference_mode()
    def embed_with_foreground(self, images: torch.Tensor) -> torch.Tensor:
        """Returns what `embed` does and, as column [D], the part of each image that is foreground."""
        output = self._forward(images)
        foreground = foreground_ratio(output.last_hidden_state[:, 1:])  # without the class token
        return torch.cat([output.image_embeds.float().cpu(), foreground[:, None]], dim=1)

    def fingerprint(self) -> Fingerprint:
        """Returns what names the encoder and its preprocessing."""
        version, told = self.preprocessing.encoder_facts()
        folder = self._folder / CLIP
        return fingerprint_model(folder, network_files(folder), version, str(self._dtype), told)

    def files(self) -> list[str]:
        """Returns what is loaded of the model's folder, relative to it."""
        return [*network_files(self._folder, CLIP), "feature_extractor/preprocessor_config.json"]

    def release(self) -> None:
        """Frees the network's memory."""
        self._network = None

    def _forward(self, images: torch.Tensor) -> Any:
        return self.network()(self.preprocessing.normalise(images).to(self._device, self._dtype))


class SelfSupervisedEncoder:
    """The `Conditioner` in `encoder.safetensors`, with the methods of `CLIPEncoder`.

    It has no `embed_with_foreground`: its backbone returns one feature an image, and no map of them.
    """

    def __init__(self, folder: Path, device: torch.device, *, lazy: bool) -> None:
        self._folder, self._device = folder, device
        # Nothing but the backbone says how wide it is. If it is not to stay, it need not go to the device for that.
        loaded = Conditioner.load(folder, torch.device("cpu") if lazy else device)
        self.embedding_dim, self._image_size = loaded.embedding_dim, loaded.image_size
        self._conditioner: Conditioner | None = None if lazy else loaded

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Does as `Conditioner.preprocess`."""
        return resize_and_crop(image, self._image_size)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Does as `Conditioner.embed`."""
        if self._conditioner is None:
            self._conditioner = Conditioner.load(self._folder, self._device)
        return self._conditioner.embed(images)

    def fingerprint(self) -> Fingerprint:
        """Returns what names the encoder; a flow of the same encoder has the same."""
        digest = fingerprint_file(self._folder / FILE)
        return Fingerprint(digest, lambda: digest)

    def files(self) -> list[str]:
        """Returns what is loaded of the model's folder."""
        return [FILE]

    def facts(self) -> list[str]:
        """Returns nothing."""
        return []

    def release(self) -> None:
        """Frees the network's memory."""
        self._conditioner = None


def open_image_encoder(
    folder: Path, dtype: torch.dtype, device: torch.device, *, lazy: bool, rule: Rule | None = None
) -> CLIPEncoder | SelfSupervisedEncoder:
    """Opens the image encoder of a Stable unCLIP's folder, of whichever kind it is; see `CLIPEncoder`.

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


def foreground_ratio(patches: torch.Tensor) -> torch.Tensor:
    """Returns how much of a source is foreground, from the feature map of a vision transformer.

    GenView (arXiv 2403.12003, section 3.2) takes the first principal component of CLIP's patch features, scaled to
    0..1, as a map of the foreground. It fits the component on a sample of the data set; here it is fitted on the
    image's own patches, so that the number depends on nothing but the source, and its sign, which is then open, is the
    one that puts less of the border into the foreground.

    Args:
        patches: float [B, h * w, C], features of a square map, row by row.

    Returns:
        float32 [B] in 0..1, on the CPU; 0 for a map without any contrast.
    """
    side = round(patches.shape[1] ** 0.5)
    assert side * side == patches.shape[1], "the feature map is square"
    centred = patches.cpu().double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    # The scores on the first component are the first eigenvector of the Gram matrix, up to scale.
    values, vectors = torch.linalg.eigh(centred @ centred.transpose(1, 2))
    scores = vectors[:, :, -1]
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    scaled = (scores - low) / (high - low).clamp(min=1e-12)
    grid = torch.zeros(side, side, dtype=torch.bool)
    grid[[0, -1]] = True
    grid[:, [0, -1]] = True
    border = grid.flatten()
    if not border.all():
        outward = scaled[:, border].mean(dim=1) > scaled[:, ~border].mean(dim=1)
        scaled = torch.where(outward[:, None], 1 - scaled, scaled)
    ratio = (scaled > FOREGROUND).float().mean(dim=1)
    return torch.where(values[:, -1] > 1e-9, ratio, torch.zeros_like(ratio))
