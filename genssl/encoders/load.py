"""Encoders from wherever they come: a run, a file, a library, a checkpoint of another framework."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from genssl.base.safetensors_file import read_tensors
from genssl.config.base import ComponentConfig
from genssl.config.encoder import EncoderConfig, Normalization, encoder_block, parse_encoder
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.load import load_dataset
from genssl.encoders.foreign import EncoderError, read_checkpoint
from genssl.encoders.foreign_networks import foreign_backbone
from genssl.encoders.libraries import (
    INCEPTION,
    STATISTICS,
    Loaded,
    digest_of,
    inception_encoder,
    timm_encoder,
    torchvision_encoder,
)
from genssl.errors import GeneratorError
from genssl.generators.conditioner import FILE, FORMAT, has_own_encoder
from genssl.generators.conditioner import load_encoder as load_own
from genssl.generators.icgan.official import FILE as RESNET
from genssl.generators.icgan.official import MEAN, NETWORK_SIZE, STD, load_resnet
from genssl.generators.models import BUILTIN, DIFFUSERS, builtin_models, read_json

GENERATOR = "builtin:"
CHECKPOINTS = (".ckpt", ".pth", ".pt", ".tar", ".bin", ".torch")
TOLD = (
    "says itself", "prefix", "passed over", "layout", "blocks", "stem", "heads", "activation", "image", "features",
    "statistics",
)  # of a checkpoint  # fmt: skip
KNOWN = (
    "a run directory, a .safetensors file, torchvision/NAME[:WEIGHTS], timm/NAME[:FILE], inception-v3[:FILE], a "
    f"generator (its folder, or builtin:NAME), or a checkpoint ({', '.join(CHECKPOINTS)})"
)


class Encoder(nn.Module):
    """A backbone behind the normalisation that it was trained with.

    Args:
        backbone: maps normalised images float [B, 3, S, S] to features [B, D], or to [B, D, 1, 1].
        mean, std: of each channel, for images in [0, 1].
    """

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features float [B, D] of images float [B, 3, S, S] in [0, 1]."""
        features: torch.Tensor = self.backbone((images - self.mean) / self.std)  # type: ignore[operator]
        return features.flatten(1)

    forward = encode


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder, frozen and in evaluation mode, and where it came from.

    Attributes:
        module: has `encode(float [B, 3, S, S] in [0, 1]) -> float [B, D]`.
        name: as it was asked for.
        image_size: side S of the images that it was made for; None where nothing says it and any size will do.
        source: plain data for provenance: kind (run, genssl, generator, torchvision, timm, checkpoint), digest of the
            file, the backbone's config where genssl has one, the normalisation, and what else the file tells.
    """

    module: Encoder
    name: str
    image_size: int | None
    source: dict[str, Any]


def load_encoder(
    name: str | EncoderConfig,
    device: torch.device,
    *,
    backbone: ComponentConfig | None = None,
    prefix: str | None = None,
    heads: int | None = None,
    normalize: Normalization | None = None,
    download: bool = False,
) -> LoadedEncoder:
    """Loads an encoder.

    Args:
        name: one of `KNOWN`, or the block of a `genssl.config.encoder.EncoderConfig`, which says for a checkpoint what
            the shapes of its tensors do not. `torchvision/resnet18` and `timm/resnet18` alone are untrained networks.
        device: where it is put.
        backbone: for checkpoints and foreign safetensors files, as `prefix` and `heads`: the network, where shapes do
            not tell it. It is then built as genssl builds it, without the peculiarities of the framework that wrote the
            file. These and the statistics stand for what the block leaves out.
        prefix: which of several networks in the file is meant.
        heads: of a ViT's attention.
        normalize: statistics of the images that the encoder was trained on; by default what the source says, and
            ImageNet's for checkpoints that say nothing. Encoders of genssl take images as they are.
        download: fetch weights of torchvision and timm that are not on this machine.

    Raises:
        EncoderError: if there is nothing of this name, it cannot be read, or it does not fit the network.
        ConfigError: if timm is missing or has no such model, or a block is wrong.
    """
    given = parse_encoder(name) if isinstance(name, str) else name
    options = {"backbone": backbone, "prefix": prefix, "heads": heads, "normalize": normalize}
    asked = given.model_copy(update={key: value for key, value in options.items() if getattr(given, key) is None})
    loaded = _load(asked, download=download)
    network, image_size, statistics, source = loaded
    told = {"backbone", "prefix", "heads", "stem_padding"}
    if source["kind"] != "checkpoint" and (unused := [key for key in told if getattr(asked, key) is not None]):
        raise EncoderError(f"{asked.encoder}: says itself what its backbone is; leave the {sorted(unused)[0]} out")
    if asked.normalize is not None:
        statistics = STATISTICS[asked.normalize]
        if "statistics" in source:
            source["statistics"] = f"{asked.normalize} (as given)"
    mean, std = statistics
    source |= {"normalize": {"mean": list(mean), "std": list(std)}}
    module = Encoder(network, mean, std).to(device).eval().requires_grad_(False)
    return LoadedEncoder(module, name if isinstance(name, str) else asked.encoder, image_size, source)


def told_of(encoder: LoadedEncoder) -> str | None:
    """Returns what was concluded from a checkpoint or assumed, and how to say it better; None for other encoders."""
    source = encoder.source
    if source["kind"] != "checkpoint":
        return None
    network = ", ".join(f"{key} {value}" for key, value in source["backbone"].items() if value not in (None, False))
    known = [f"{fact}: {source[fact]}" for fact in TOLD if fact in source]
    said = {"prefix": source["prefix"]} if source["prefix"] != "none" else {}
    for key, fact, pattern in (
        ("heads", "heads", r"(\d+)"), ("stem_padding", "stem", r"stride 1, padded by (\d)"),
        ("normalize", "statistics", r"(\w+) \("),
    ):  # fmt: skip
        if (match := re.match(pattern, source.get(fact, ""))) is not None:
            said[key] = match[1]
    return (
        f"{source['path']}: network: {network.removeprefix('name ')}; {'; '.join(known)}. "
        f"To say otherwise, change: {encoder_block(source['path'], **said)}"
    )


def _load(asked: EncoderConfig, *, download: bool) -> Loaded:
    name = asked.encoder
    path = Path(name).expanduser()
    library, _, model = name.partition("/")
    inception, _, weights = name.partition(":")
    if _is_generator(name):
        loaded = _from_generator(name)
    elif path.is_dir():
        loaded = _from_run(path)
    elif path.is_file() and path.suffix == ".safetensors" and _is_own(path):
        loaded = _from_own_file(path, "genssl")
    elif path.is_file() and path.suffix in (".safetensors", *CHECKPOINTS):
        loaded = _from_foreign_file(path, asked)
    elif inception == INCEPTION:
        loaded = inception_encoder(weights, download=download)
    elif library == "torchvision" and model:
        loaded = torchvision_encoder(model, download=download)
    elif library == "timm" and model:
        loaded = timm_encoder(model, download=download)
    elif path.exists():
        raise EncoderError(f"{name}: is not an encoder; give {KNOWN}")
    else:
        raise EncoderError(f"{name}: there is no such file or folder; give {KNOWN}")
    return loaded


def _from_run(folder: Path) -> Loaded:
    path = folder / FILE
    if not path.is_file():
        if (folder / "recipe.yaml").exists():
            raise EncoderError(
                f"{folder}: the run has no {FILE} yet, which it writes at its end; finish it with: "
                f"genssl run --resume {folder}"
            )
        raise EncoderError(f"{folder}: holds no {FILE}; give {KNOWN}")
    network, image_size, statistics, source = _from_own_file(path, "run")
    if image_size is None and (folder / "recipe.yaml").exists():
        dataset = load(Recipe, folder / "recipe.yaml").dataset
        image_size = getattr(dataset, "image_size", None)
        if image_size is None:  # a data set with one size only, such as the digits
            image_size = load_dataset(dataset, "train").image_size
    return network, image_size, statistics, source


def _from_own_file(path: Path, kind: str) -> Loaded:
    network, config, image_size = load_own(path)
    source = {"kind": kind, "path": str(path), "digest": digest_of(path), "backbone": config.model_dump(mode="json")}
    return network, image_size or getattr(config, "image_size", None), STATISTICS["none"], source


def _is_own(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"{path}: cannot be read as safetensors ({error}); get the file again") from None


def _from_foreign_file(path: Path, asked: EncoderConfig) -> Loaded:
    try:
        tensors, itself = (read_tensors(path)[0], None) if path.suffix == ".safetensors" else read_checkpoint(path)
    except (OSError, SafetensorError) as error:
        raise EncoderError(f"{path}: cannot be read as safetensors ({error}); get the file again") from None
    found = foreign_backbone(path, tensors, asked, itself)
    source = {
        "kind": "checkpoint",
        "path": str(path),
        "digest": digest_of(path),
        "backbone": found.config.model_dump(mode="json"),
        **found.facts,
    }
    statistics = STATISTICS[found.normalize] if isinstance(found.normalize, str) else found.normalize
    size = getattr(found.config, "image_size", None)
    if size is None and (own := getattr(found.network, "pretrained_cfg", None)) is not None:
        size = int(own["input_size"][-1])
    return found.network, size, statistics, source


def _is_generator(name: str) -> bool:
    """Says whether a name is that of a built-in generator, or of a folder that holds one with a conditioner."""
    folder = Path(name).expanduser()
    return name.startswith(GENERATOR) or (folder / DIFFUSERS).is_file() or (folder / RESNET).is_file()


def _from_generator(name: str) -> Loaded:
    """Loads what a generator embeds images with; embeddings are of any length, as they come."""
    folder = Path(name).expanduser()
    if name.startswith(GENERATOR):
        known = sorted({*builtin_models(), *builtin_models("config.json")})
        if name.removeprefix(GENERATOR) not in known:
            raise GeneratorError(f"{name}: there is no such built-in generator; there are {', '.join(known)}")
        folder = BUILTIN / name.removeprefix(GENERATOR)
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
    if (folder / FILE).is_file():
        backbone, config, image_size = load_own(folder / FILE)
        source["backbone"] = config.model_dump(mode="json")
        return backbone, image_size, STATISTICS["none"], source
    return load_resnet(folder), NETWORK_SIZE, (MEAN, STD), source


class _Embeds(nn.Module):
    """Takes the projected embedding out of what a CLIP image encoder returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.network(images).image_embeds
        return embeddings
