"""IC-GAN (Casanova et al. 2021, arXiv 2109.05070): one forward pass from an instance feature and noise to an image.

Noise is normal, truncated row by row to [-2 t, 2 t] for truncation t (the paper's 0.7 gives |z| <= 1.4), as in the
official notebook. It is drawn by the inverse of the distribution function, so that the truncation does not change how
many numbers a row takes from its stream: equal seeds at different truncations give similar images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from genssl.base.safetensors_file import read_tensors
from genssl.errors import GeneratorError
from genssl.generators.base import DescribedGenerator, count_tflops
from genssl.generators.conditioner import FILE, Conditioner
from genssl.generators.configs import ICGANConfig
from genssl.generators.fingerprint import fingerprint_model
from genssl.generators.finite import check_made, check_weights
from genssl.generators.icgan.networks import Architecture, GeneratorNetwork
from genssl.generators.icgan.official import FILE as FEATURES
from genssl.generators.icgan.official import ResNetFeatures
from genssl.generators.models import OWN, find_trained, licence_of, read_json
from genssl.generators.parameters import Parameters

SAMPLER_VERSION = "icgan/1"
CLASS = "GensslICGAN"
FORMAT = "genssl-icgan/1"
WEIGHTS = "generator.safetensors"
MAX_PIXELS = 2**22  # of a batch, generated at once
MAX_TRUNCATION = 4.0
MAX_BEST_OF = 64


class ICGAN(DescribedGenerator):
    """An IC-GAN on one device: trained by `genssl train-generator`, or made of official weights by `convert-weights`.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or its files do not fit each other.
    """

    _encoder: Conditioner | ResNetFeatures

    def __init__(self, config: ICGANConfig, device: torch.device) -> None:
        folder = find_trained(config.model, CLASS)
        facts = read_json(folder / "config.json")
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._network = _load_network(folder, facts, self._dtype, device)
        self._architecture = architecture = self._network.architecture
        self._encoder, preprocess = _conditioner(folder, facts, config, architecture, device)
        self._output_size = config.output_size or architecture.resolution
        defaults: Parameters = {"truncation": config.truncation, "best_of": config.best_of}
        if architecture.classes:
            defaults["class_id"] = config.class_id or 0
        elif config.class_id is not None:
            raise GeneratorError(f"generator.class_id: {config.model} is not class-conditional; leave it out")
        own = isinstance(self._encoder, Conditioner)
        named = [config.dtype, f"preprocess={preprocess}", f"output_size={self._output_size}"]
        if not own:  # once the square was cut out to half a pixel
            named.append("crop=pixel")
        files = [OWN, WEIGHTS, FILE if own else FEATURES]
        self._describe(
            config,
            fingerprint_model(folder, files, SAMPLER_VERSION, *named, keep_order=[OWN]),
            image_size=self._output_size,
            licence=licence_of(folder, "unknown: the folder has no card.json"),
            settings={"dtype": config.dtype, "preprocess": preprocess, "output_size": str(self._output_size)},
            defaults=defaults,
        )

    def _bounds(self) -> dict[str, tuple[float, float]]:
        bounds: dict[str, tuple[float, float]] = {"truncation": (0, MAX_TRUNCATION), "best_of": (1, MAX_BEST_OF)}
        classes = self._architecture.classes
        return bounds | ({"class_id": (0, classes - 1)} if classes else {})

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """Only the number of tries must agree within a batch, since it multiplies the cost."""
        return (parameters["best_of"],)

    @torch.inference_mode()
    def generate(
        self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Sequence[Parameters], **hooks: Any
    ) -> torch.Tensor:
        """Makes one image a row; see `Generator.generate`.

        With `best_of` k, k images are made of a row's stream and the one whose embedding is nearest to the row's
        (cosine) is kept; the first of them is the image of `best_of` 1.
        """
        tries = int(parameters[0]["best_of"])
        rows = [
            truncated_normal((tries, self._architecture.noise_dim), float(row["truncation"]), seed)
            for row, seed in zip(parameters, seeds, strict=True)
        ]
        noise = torch.stack(rows).float()
        classes = None
        if self._architecture.classes:
            classes = torch.tensor([int(row["class_id"]) for row in parameters])
        best = self._images(noise[:, 0], embeddings, classes)
        if tries > 1:
            highest = self._similarity(best, embeddings)
            for number in range(1, tries):
                images = self._images(noise[:, number], embeddings, classes)
                similarity = self._similarity(images, embeddings)
                best = torch.where((similarity > highest).view(-1, 1, 1, 1), images, best)
                highest = torch.maximum(similarity, highest)
        if self._output_size != best.shape[-1]:
            size = (self._output_size, self._output_size)
            best = F.interpolate(best.float(), size=size, mode="bicubic", antialias=True).clamp(0, 255).round().byte()
        return best

    def _tflops(self) -> float:
        one = torch.zeros((1, 1), device=self._device, dtype=self._dtype)
        noise, feature = (one.expand(1, width) for width in (self._architecture.noise_dim, self._encoder.embedding_dim))
        classes = one[0].long() if self._architecture.classes else None
        return count_tflops(lambda: self._network(noise, feature, classes)) * self.spec.defaults["best_of"]

    def _images(self, noise: torch.Tensor, embeddings: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        """Returns uint8 [B, 3, resolution, resolution] on the CPU."""
        part = max(1, MAX_PIXELS // self._architecture.resolution**2)
        made = []
        for start in range(0, len(noise), part):
            rows = slice(start, start + part)
            images = self._network(
                noise[rows].to(self._device, self._dtype),
                embeddings[rows].to(self._device, self._dtype),
                None if classes is None else classes[rows].to(self._device),
            )
            check_made(images, self.spec.title, "images", self._dtype)
            # Rounded; the official scripts cut off, which is half a grey level darker.
            made.append(((images.float() / 2 + 0.5) * 255).round().to(torch.uint8).cpu())
        return torch.cat(made)

    def _similarity(self, images: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Returns the cosines float32 [B] of uint8 images with the embeddings that they were made of."""
        if images.shape[-1] != self._encoder.image_size:
            images = torch.stack([torch.from_numpy(self.preprocess(image)) for image in images.numpy()])
        return F.cosine_similarity(self.embed(images), embeddings.float(), dim=1)


def truncated_normal(shape: tuple[int, ...], truncation: float, seed: int) -> torch.Tensor:
    """Draws float64 (CPU) from a standard normal restricted to [-2 truncation, 2 truncation]; 4 hardly truncates."""
    uniform = torch.rand(shape, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(seed))
    below = 0.5 * math.erfc(2 * truncation / math.sqrt(2))  # the part of a normal under the lower bound
    drawn: torch.Tensor = torch.special.ndtri(below + uniform * (1 - 2 * below))
    return drawn.clamp(-2 * truncation, 2 * truncation)


def _load_network(folder: Path, facts: dict[str, Any], dtype: torch.dtype, device: torch.device) -> GeneratorNetwork:
    """Builds the network that config.json describes, with the folder's weights; batch norms stay in float32."""
    if facts.get("format") != FORMAT:
        raise GeneratorError(f"{folder / 'config.json'}: format {facts.get('format')!r} is not {FORMAT!r}")
    try:
        architecture = Architecture.from_json(facts.get("architecture", {}))
    except (ValueError, TypeError) as error:
        raise GeneratorError(f"{folder / 'config.json'}: architecture: {error}") from None
    try:
        weights = read_tensors(folder / WEIGHTS)[0]
    except (OSError, SafetensorError) as error:
        raise GeneratorError(f"{folder / WEIGHTS}: cannot be read as safetensors ({error})") from None
    with torch.device("meta"):
        network = GeneratorNetwork(architecture)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise GeneratorError(f"{folder / WEIGHTS}: does not fit the architecture in config.json: {reason}") from None
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    network.to(device=device, dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    check_weights(folder / WEIGHTS, network.state_dict())
    return network.eval().requires_grad_(False)


def _conditioner(
    folder: Path, facts: dict[str, Any], config: ICGANConfig, architecture: Architecture, device: torch.device
) -> tuple[Conditioner | ResNetFeatures, str]:
    """Returns the model's conditioner, and the name of its preprocessing."""
    official = facts.get("preprocess")
    conditioner: Conditioner | ResNetFeatures
    if official is None:
        if config.preprocess is not None:
            raise GeneratorError(
                f"generator.preprocess: {config.model} is not made of official weights; leave preprocess out"
            )
        conditioner, preprocess = Conditioner.load(folder, device), "conditioner"
    else:
        preprocess = config.preprocess or official
        if preprocess not in ("train", "colab", "raw"):
            raise GeneratorError(f"{folder / 'config.json'}: preprocess {preprocess!r} is not train, colab or raw")
        conditioner = ResNetFeatures(folder, architecture.resolution, preprocess, device)
    if conditioner.embedding_dim != architecture.feature_dim:
        raise GeneratorError(
            f"{folder}: the conditioner makes {conditioner.embedding_dim} numbers an image, and the generator takes "
            f"{architecture.feature_dim}; they do not belong together"
        )
    return conditioner, preprocess
