"""Encoders of libraries: the classifiers of torchvision, the networks of timm, and torch-fidelity's Inception.

The Inception is that of Frechet inception distances (Heusel et al. 2017, arXiv 1706.08500), with the features of the
original TensorFlow network; torchvision's and timm's give other distances.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from genssl.backbones.configs import TimmConfig
from genssl.backbones.timm import build_timm
from genssl.base.devices import seeded_initialisation
from genssl.encoders.foreign import EncoderError, read_checkpoint
from genssl.errors import suggest

Statistics = tuple[Sequence[float], Sequence[float]]
Loaded = tuple[nn.Module, int | None, Statistics, dict[str, Any]]
"""A network, the side of the images it was made for, the statistics of its normalisation, and where it came from."""

# Mean and standard deviation of the red, green and blue values; those of CIFAR are solo-learn's.
STATISTICS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
CLASSIFIERS = ("fc", "classifier", "heads", "head")  # what torchvision's models call theirs
INCEPTION = "inception-v3"
INSTALL = "pip install 'genssl[metrics]'"
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
FEATURES = "2048"  # of the last pooling


def _weights_of(model: str) -> tuple[str, str | None]:
    """Splits NAME[:WEIGHTS]."""
    name, colon, weights = model.partition(":")
    return name, weights if colon else None


def torchvision_encoder(model: str, *, download: bool) -> Loaded:
    """Loads a classifier of torchvision without its last layer; NAME alone is an untrained network."""
    name, wanted = _weights_of(model)
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


def timm_encoder(model: str, *, download: bool) -> Loaded:
    """Loads a network of timm; WEIGHTS are a local file or "pretrained", timm's own, and NAME alone is untrained."""
    name, weights = _weights_of(model)
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


def inception_encoder(given: str, *, download: bool) -> Loaded:
    """Loads torch-fidelity's Inception from a file, by default the one in torch's hub folder."""
    file = Path(given).expanduser() if given else Path(torch.hub.get_dir()) / "checkpoints" / FILE
    if download and not given and not file.is_file():
        with _fetching(INCEPTION):
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file), progress=False)
    network = _inception(file)
    source = {"kind": "torch-fidelity", "model": INCEPTION, "digest": digest_of(file)}
    return network, None, STATISTICS["none"], source


@contextmanager
def _fetching(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # no network, another file at the address, no such weights
        raise EncoderError(f"{what}: the weights could not be fetched ({str(error)[:200]}); try again later") from None


class Inception(nn.Module):
    """Maps images float [B, 3, S, S] in [0, 1] to features float [B, 2048].

    Images are rounded to grey levels and resized to 299 pixels by TensorFlow 1's rule, as for published distances.

    Args:
        extractor: torch-fidelity's.
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        grey_levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
        features: torch.Tensor = self.extractor(grey_levels)[0]
        return features


def _inception(file: Path) -> Inception:
    try:
        module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise EncoderError(f"{INCEPTION}: torch-fidelity is not installed; run `{INSTALL}`") from None
    if not file.is_file():
        raise EncoderError(f"{INCEPTION}: the weights are not in {file}; put {URL} there, or fetch them by --download")
    tensors, _ = read_checkpoint(file)
    # torch-fidelity unpickles whatever its file holds, so it gets one that holds these tensors and nothing else.
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / FILE
        torch.save(tensors, clean)
        try:
            extractor = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", [FEATURES], feature_extractor_weights_path=str(clean)
            )
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise EncoderError(f"{file}: is not torch-fidelity's Inception ({reason}); get {URL}") from None
    return Inception(extractor)


def digest_of(path: Path) -> str:
    """Returns 32 hex digits that tell files apart."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
