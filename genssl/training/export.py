"""Writes the encoder of a run in the formats of others, and checks that what is read back gives the same features."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
import torchvision
from torch import nn

from genssl.backbones.configs import ResNetConfig, TimmConfig, ViTConfig
from genssl.config.base import ComponentConfig
from genssl.errors import UserError
from genssl.generators.conditioner import FORMAT
from genssl.generators.conditioner import load_encoder as load_own
from genssl.generators.safetensors_file import read_tensors, write_tensors
from genssl.registry import BACKBONES
from genssl.runtime import seeded_initialisation, stream
from genssl.training.encoders import LoadedEncoder
from genssl.training.files import write_atomically

Format = Literal["torchvision", "timm", "safetensors", "onnx"]
FORMATS: tuple[Format, ...] = ("torchvision", "timm", "safetensors", "onnx")
SUFFIXES: dict[str, tuple[str, ...]] = {
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".safetensors", ".pth", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
}
STANDARD_WIDTH, STANDARD_STAGES = 64, 4
IMAGES = 4
# Largest difference that is put down to the order of additions, as a part of the largest feature.
TOLERANCE = 1e-4
ONNX = ("onnx", "onnxscript", "onnxruntime")


class ExportError(UserError):
    """An encoder that a format cannot hold, or that came back different."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the file.
        difference: largest difference of a feature read back, as a part of the largest feature.
        usage: how it is loaded, as lines of Python.
    """

    path: Path
    difference: float
    usage: str


def export_encoder(encoder: LoadedEncoder, to: Format, out: Path) -> Exported:
    """Writes an encoder, whole or not at all.

    Args:
        encoder: of a run of genssl, on the CPU.
        to: torchvision and timm: a state dict of their network without classifier; safetensors: genssl's own file;
            onnx: a graph from "images" float [B, 3, S, S] in [0, 1] to "features" float [B, D], any B.
        out: the file; replaced if it exists.

    Raises:
        ExportError: if the format cannot hold the network, a library is missing, the suffix is another format's, or
            the features that are read back differ.
    """
    if encoder.source["kind"] not in ("run", "genssl"):
        raise ExportError(f"{encoder.name}: is no encoder of genssl; export takes run directories and their encoders")
    if out.suffix not in SUFFIXES[to]:
        raise ExportError(f"--out {out}: a file for {to} ends in {' or '.join(SUFFIXES[to])}")
    if out.is_dir() or not out.parent.is_dir():
        raise ExportError(f"--out {out}: {'is a directory' if out.is_dir() else f'{out.parent} does not exist'}")
    block = encoder.source["backbone"]
    config: ComponentConfig = BACKBONES.config(block["name"]).model_validate(block)
    size = encoder.image_size or (32 if getattr(config, "stem", "") == "small" else 224)
    writers: dict[str, Callable[[], _Format]] = {
        "torchvision": lambda: _torchvision(encoder, config),
        "timm": lambda: _timm(encoder, config),
        "safetensors": lambda: _safetensors(encoder, config),
        "onnx": lambda: _onnx(encoder, size),
    }
    chosen = writers[to]()
    images = torch.rand((IMAGES, 3, size, size), generator=stream("export", size))
    with torch.no_grad():
        expected = encoder.module.encode(images)
    difference = 0.0

    def write_and_check(partial: Path) -> None:
        nonlocal difference
        chosen.write(partial, out.suffix)
        with torch.no_grad():
            features = chosen.read(partial, out.suffix)(images)
        difference = float((features - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if features.shape != expected.shape or not difference <= TOLERANCE:
            raise ExportError(
                f"{encoder.name}: features read back from {to} differ by {difference:.1e} of the largest one "
                f"({TOLERANCE:.0e} is allowed); nothing was written to {out}"
            )

    write_atomically(out, write_and_check)
    load_call = f"safetensors.torch.load_file({str(out)!r})"
    if out.suffix in (".pth", ".pt"):
        load_call = f"torch.load({str(out)!r}, weights_only=True)"
    return Exported(out, difference, chosen.usage.replace("LOAD", load_call).replace("FILE", str(out)))


Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Format:
    """How a file is written, how it is read back, and how others read it; both functions take path and suffix."""

    write: Callable[[Path, str], None]
    read: Callable[[Path, str], Read]
    usage: str


def _weights(encoder: LoadedEncoder) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in encoder.module.backbone.state_dict().items()}


def _state_dict(encoder: LoadedEncoder, build: Callable[[], nn.Module], usage: str) -> _Format:
    """The weights under the names that genssl's networks share with those of torchvision and timm."""

    def write(path: Path, suffix: str) -> None:
        if suffix == ".safetensors":
            write_tensors(path, _weights(encoder))
        else:
            torch.save(_weights(encoder), path)

    def read(path: Path, suffix: str) -> Read:
        tensors = read_tensors(path)[0] if suffix == ".safetensors" else torch.load(path, weights_only=True)
        with seeded_initialisation("export"):
            network = build().eval()
        network.load_state_dict(tensors)
        return network

    return _Format(write, read, f"{usage}\nmodel.load_state_dict(LOAD)")


def _torchvision(encoder: LoadedEncoder, config: ComponentConfig) -> _Format:
    if not _is_standard(config):
        raise ExportError(
            f"{encoder.name}: torchvision has no {_described(config)}; it has ResNet-18, -34 and -50 of width "
            f"{STANDARD_WIDTH} and {STANDARD_STAGES} stages; use --to safetensors or --to onnx"
        )

    def build() -> nn.Module:
        network: Any = torchvision.models.get_model(config.name, weights=None)
        network.fc = nn.Identity()
        if config.stem == "small":
            network.conv1 = nn.Conv2d(3, STANDARD_WIDTH, kernel_size=3, stride=1, padding=1, bias=False)
            network.maxpool = nn.Identity()
        return network  # type: ignore[no-any-return]

    usage = f"model = torchvision.models.{config.name}(); model.fc = torch.nn.Identity()"
    if config.stem == "small":
        usage += "\nmodel.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False); model.maxpool = torch.nn.Identity()"
    return _state_dict(encoder, build, usage)


def _timm(encoder: LoadedEncoder, config: ComponentConfig) -> _Format:
    arguments: dict[str, Any] = {}
    if isinstance(config, TimmConfig):
        name = config.name.removeprefix("timm/")
        arguments = {} if config.image_size is None else {"img_size": config.image_size}
    elif isinstance(config, ViTConfig):
        name = f"{config.name}_patch16_224"
        arguments = {"img_size": config.image_size, "patch_size": config.patch_size, "depth": config.depth}
        if config.interpolate_positions:
            arguments["dynamic_img_size"] = True
    elif _is_standard(config) and config.stem == "imagenet":
        name = config.name
    else:
        raise ExportError(
            f"{encoder.name}: timm has no {_described(config)}; it has ViTs, and ResNet-18, -34 and -50 of width "
            f"{STANDARD_WIDTH} and {STANDARD_STAGES} stages with the ImageNet stem; use --to torchvision, "
            "safetensors or onnx"
        )
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ExportError("--to timm: timm is needed to check the file; run `pip install 'genssl[timm]'`") from None

    def build() -> nn.Module:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        return network

    shown = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return _state_dict(encoder, build, f"model = timm.create_model({name!r}, num_classes=0{shown})")


def _safetensors(encoder: LoadedEncoder, config: ComponentConfig) -> _Format:
    metadata = {"format": FORMAT, "backbone": config.model_dump_json(), "source": encoder.name}
    if encoder.image_size is not None:
        metadata["image_size"] = str(encoder.image_size)

    def write(path: Path, suffix: str) -> None:
        write_tensors(path, _weights(encoder), metadata)

    def read(path: Path, suffix: str) -> Read:
        return load_own(path)[0].eval()

    usage = "from genssl.training.encoders import load_encoder\nload_encoder('FILE', torch.device('cpu')).module.encode"
    return _Format(write, read, usage)


def _onnx(encoder: LoadedEncoder, size: int) -> _Format:
    for library in ONNX:
        try:
            importlib.import_module(library)
        except ImportError:
            raise ExportError(
                f"--to onnx: {library} is needed to write and check the file; run `pip install 'genssl[onnx]'`"
            ) from None
    onnxruntime = importlib.import_module("onnxruntime")

    def write(path: Path, suffix: str) -> None:
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(
            encoder.module,
            (torch.zeros(2, 3, size, size),),
            path,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    def read(path: Path, suffix: str) -> Read:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0].shape
        if not isinstance(given[0], str):  # a number where the name of a free dimension belongs
            raise ExportError(
                f"{encoder.name}: the network fixes the batch size, so its graph would take {given[0]} images only; "
                "use another format"
            )
        return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])

    usage = "session = onnxruntime.InferenceSession('FILE'); session.run(['features'], {'images': images})"
    return _Format(write, read, usage)


def _is_standard(config: ComponentConfig) -> TypeGuard[ResNetConfig]:
    """Whether it is, but for its stem, one of torchvision's and timm's ResNets; neither has one of ten layers."""
    size = (STANDARD_WIDTH, STANDARD_STAGES)
    return isinstance(config, ResNetConfig) and config.name != "resnet10" and (config.width, config.stages) == size


def _described(config: ComponentConfig) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in config.model_dump(mode="json").items() if name != "name")
    return f"{config.name} ({settings})"
