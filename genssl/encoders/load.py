"""Encoders from wherever they come: a run, a file, a library, a checkpoint of another framework."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from torch import nn

from genssl.backbones.configs import TimmConfig
from genssl.backbones.timm import build_timm
from genssl.base.devices import seeded_initialisation
from genssl.base.safetensors_file import read_tensors
from genssl.config.base import ComponentConfig
from genssl.config.encoder import EncoderConfig, Normalization, encoder_block, parse_encoder
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.load import load_dataset
from genssl.encoders.foreign import EncoderError, read_checkpoint
from genssl.encoders.foreign_networks import foreign_backbone
from genssl.encoders.generator_encoders import is_generator, load_conditioner
from genssl.encoders.inception import NAME as INCEPTION
from genssl.encoders.inception import URL, cached_file, load_inception
from genssl.errors import suggest
from genssl.generators.conditioner import FILE, FORMAT
from genssl.generators.conditioner import load_encoder as load_own

# Mean and standard deviation of the red, green and blue values; those of CIFAR are solo-learn's.
STATISTICS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
CHECKPOINTS = (".ckpt", ".pth", ".pt", ".tar", ".bin", ".torch")
TOLD = (
    "says itself", "prefix", "passed over", "layout", "blocks", "stem", "heads", "activation", "image", "features",
    "statistics",
)  # of a checkpoint  # fmt: skip
CLASSIFIERS = ("fc", "classifier", "heads", "head")  # what torchvision's models call theirs
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


Loaded = tuple[nn.Module, int | None, tuple[Sequence[float], Sequence[float]], dict[str, Any]]


def _load(asked: EncoderConfig, *, download: bool) -> Loaded:
    name = asked.encoder
    path = Path(name).expanduser()
    library, _, model = name.partition("/")
    if is_generator(name):
        loaded = load_conditioner(name)
    elif path.is_dir():
        loaded = _from_run(path)
    elif path.is_file() and path.suffix == ".safetensors" and _is_own(path):
        loaded = _from_own_file(path, "genssl")
    elif path.is_file() and path.suffix in (".safetensors", *CHECKPOINTS):
        loaded = _from_foreign_file(path, asked)
    elif name.partition(":")[0] == INCEPTION:
        loaded = _from_fidelity(name.partition(":")[2], download=download)
    elif library == "torchvision" and model:
        loaded = _from_torchvision(*_weights_of(model), download=download)
    elif library == "timm" and model:
        loaded = _from_timm(*_weights_of(model), download=download)
    elif path.exists():
        raise EncoderError(f"{name}: is no encoder; give {KNOWN}")
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


def _weights_of(model: str) -> tuple[str, str | None]:
    """Splits NAME[:WEIGHTS]."""
    name, colon, weights = model.partition(":")
    return name, weights if colon else None


def _from_torchvision(name: str, wanted: str | None, *, download: bool) -> Loaded:
    models = torchvision.models
    available = models.list_models(module=models)
    if name not in available:
        near = difflib.get_close_matches(name, available, n=3)
        hint = f"; did you mean {' or '.join(f'torchvision/{match}' for match in near)}?" if near else ""
        raise EncoderError(f"torchvision/{name}: torchvision {torchvision.__version__} has no such classifier{hint}")
    with seeded_initialisation("encoder", name):
        network: nn.Module = models.get_model(name, weights=None)
    source: dict[str, Any] = {
        "kind": "torchvision",
        "model": name,
        "weights": wanted,
        "torchvision": str(torchvision.__version__),
    }
    image_size, statistics = 224, STATISTICS["imagenet"]
    if wanted is not None:
        choices = {entry.name: entry for entry in models.get_model_weights(name)}
        if wanted not in (*choices, "DEFAULT"):
            raise EncoderError(f"torchvision/{name}:{wanted}: there are no such weights{suggest(wanted, choices)}")
        weights = models.get_weight(f"{models.get_model_weights(name).__name__}.{wanted}")
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        if not file.is_file():
            if not download:
                raise EncoderError(
                    f"torchvision/{name}:{wanted}: the weights are not in {file}; put {weights.url} there, or let "
                    "them be fetched by --download"
                )
            with _fetching(f"torchvision/{name}:{wanted}"):
                torch.hub.load_state_dict_from_url(weights.url, check_hash=True, map_location="cpu", weights_only=True)
        network.load_state_dict(read_checkpoint(file)[0])
        preset = weights.transforms()
        image_size, statistics = preset.crop_size[0], (preset.mean, preset.std)
        source |= {"weights": weights.name, "digest": digest_of(file)}
    _take_classifier_off(network)
    return network, image_size, statistics, source


def _take_classifier_off(network: nn.Module) -> None:
    for attribute in CLASSIFIERS:
        head = getattr(network, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(network, attribute, nn.Identity())
            return
        if isinstance(head, nn.Sequential):
            last = [index for index, layer in enumerate(head) if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
            head[last] = nn.Identity()
            return
    raise EncoderError(f"torchvision: a {type(network).__name__} has no classifier that could be taken off")


def _from_timm(name: str, weights: str | None, *, download: bool) -> Loaded:
    """Weights are a local file, "pretrained" (timm's own), or none."""
    source: dict[str, Any] = {"kind": "timm", "model": name, "weights": weights}
    if weights == "pretrained" and not download:
        raise EncoderError(
            f"timm/{name}:pretrained: timm's weights are fetched by --download alone; or give a file, timm/{name}:FILE"
        )
    file = Path(weights).expanduser() if weights not in (None, "pretrained") else None
    with seeded_initialisation("encoder", name):
        network: Any = build_timm(TimmConfig(name=f"timm/{name}", weights=file))
    if weights == "pretrained":
        width = network.feature_dim
        with _fetching(f"timm/{name}"):
            network = importlib.import_module("timm").create_model(name, pretrained=True, num_classes=0)
        network.feature_dim = width
    if file is not None:
        source["digest"] = digest_of(file)
    facts = network.pretrained_cfg
    return network, int(facts["input_size"][-1]), (facts["mean"], facts["std"]), source


def _from_fidelity(given: str, *, download: bool) -> Loaded:
    file = Path(given).expanduser() if given else cached_file()
    if download and not given and not file.is_file():
        with _fetching(INCEPTION):
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), progress=False)
    network = load_inception(file)
    source = {"kind": "torch-fidelity", "model": INCEPTION, "digest": digest_of(file)}
    return network, None, STATISTICS["none"], source


@contextmanager
def _fetching(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # no network, another file at the address, no such weights
        raise EncoderError(f"{what}: the weights could not be fetched ({str(error)[:200]}); try again later") from None


def digest_of(path: Path) -> str:
    """Returns 32 hex digits that tell files apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
