"""Writes the encoder of a run in the formats of others, and checks that what is read back gives the same features."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import nn

from genssl.backbones.configs import ResNetConfig, TimmConfig, ViTConfig
from genssl.backbones.resnet import LAYERS
from genssl.base.devices import seeded_initialisation, stream
from genssl.base.files import write_atomically
from genssl.base.safetensors_file import read_tensors, write_tensors
from genssl.config.base import ComponentConfig
from genssl.encoders.load import LoadedEncoder
from genssl.errors import UserError
from genssl.generators.conditioner import FORMAT
from genssl.generators.conditioner import load_encoder as load_own
from genssl.registry import BACKBONES

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
    """What was written."""

    path: Path
    difference: float  # the largest of a feature that is read back, as a part of the largest feature
    usage: str  # a Python program that loads it and gives features of random images


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
        raise ExportError(
            f"{encoder.name}: is not an encoder of genssl; export takes run directories and their encoders"
        )
    if encoder.source["normalize"] != {"mean": [0.0] * 3, "std": [1.0] * 3}:
        raise ExportError(f"{encoder.name}: an exported encoder takes images as they are; leave `normalize` out")
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
    sized = encoder.image_size is not None
    usage = USAGE.format(
        load=chosen.usage(out),
        side=size if sized else "S",
        any="" if sized else f" of any side S, such as {size},",
        images=chosen.images.format(size=size),
        run=chosen.run,
        width=expected.shape[1],
    )
    return Exported(out, difference, usage)


Read = Callable[[torch.Tensor], torch.Tensor]
USAGE = """{load}
# Images: float32 [B, 3, {side}, {side}],{any} RGB in [0, 1] and not normalised: no mean is subtracted, no deviation
# divided by. Features: float32 [B, {width}].
images = {images}
{run}"""
RUN = "with torch.no_grad():\n    features = model(images)"


@dataclass(frozen=True)
class _Format:
    """How a file is written, how it is read back, and how others read it; the first two take path and suffix."""

    write: Callable[[Path, str], None]
    read: Callable[[Path, str], Read]
    usage: Callable[[Path], str]  # lines of Python that load a file
    images: str = "torch.rand(2, 3, {size}, {size})"  # a line that makes random images of a side `size`
    run: str = RUN  # and one that gives their features


def _weights(encoder: LoadedEncoder) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in encoder.module.backbone.state_dict().items()}


def _state_dict(encoder: LoadedEncoder, library: str, build: str) -> _Format:
    """The weights under the names that genssl's networks share with those of torchvision and timm.

    `build` are lines of Python that make the library's network as `model`; they are printed, and run for the check.
    """

    def write(path: Path, suffix: str) -> None:
        if suffix == ".safetensors":
            write_tensors(path, _weights(encoder))
        else:
            torch.save(_weights(encoder), path)

    def read(path: Path, suffix: str) -> Read:
        tensors = read_tensors(path)[0] if suffix == ".safetensors" else torch.load(path, weights_only=True)
        names: dict[str, Any] = {}
        with seeded_initialisation("export"):
            exec(f"import torch\nimport {library}\n{build}", names)
        network: nn.Module = names["model"].eval()
        network.load_state_dict(tensors)
        return network

    def usage(path: Path) -> str:
        own = path.suffix == ".safetensors"
        modules = sorted({"torch", library, *(["safetensors.torch"] if own else [])})
        imports = "\n".join(f"import {module}" for module in modules)
        load = f"safetensors.torch.load_file({str(path)!r})" if own else f"torch.load({str(path)!r}, weights_only=True)"
        return f"{imports}\n\n{build}\nmodel.load_state_dict({load})\nmodel.eval()"

    return _Format(write, read, usage)


def _torchvision(encoder: LoadedEncoder, config: ComponentConfig) -> _Format:
    if not isinstance(config, ResNetConfig):
        raise ExportError(
            f"{encoder.name}: torchvision has no {_described(config)}; use --to timm, --to safetensors or --to onnx"
        )
    return _state_dict(encoder, "torchvision", _torchvision_lines(config))


def _torchvision_lines(config: ResNetConfig) -> str:
    """Returns lines that make any ResNet of genssl of torchvision's parts."""
    width, small = config.width, config.stem == "small"
    stem = f"torch.nn.Conv2d(3, {width}, {'3, stride=1, padding=1' if small else '7, stride=2, padding=3'}, bias=False)"
    if _is_standard(config):
        lines = [f"model = torchvision.models.{config.name}()"]
        lines += [f"model.conv1 = {stem}"] if small else []
    else:
        block, counts = LAYERS[config.name]
        lines = [
            f"block, width = torchvision.models.resnet.{block.__name__}, {width}",
            f"model = torchvision.models.ResNet(block, {list(counts)})",
            f"model.conv1, model.bn1 = {stem}, torch.nn.BatchNorm2d(width)",
            "model.inplanes = width",
            f"for stage, count in enumerate({list(counts[: config.stages])}):",
            "    layer = model._make_layer(block, width * 2**stage, count, stride=1 if stage == 0 else 2)",
            "    setattr(model, f'layer{stage + 1}', layer)",
        ]
        lines += [f"model.layer{stage + 1} = torch.nn.Identity()" for stage in range(config.stages, STANDARD_STAGES)]
    lines += ["model.maxpool = torch.nn.Identity()"] if small else []
    return "\n".join([*lines, "model.fc = torch.nn.Identity()"])


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
        if config.heads is not None:
            arguments["num_heads"] = config.heads
        if config.layer_scale is not None:
            arguments["init_values"] = config.layer_scale
        if config.registers:
            arguments |= {"reg_tokens": config.registers, "no_embed_class": True}
    elif _is_standard(config):
        name = config.name
    else:
        raise ExportError(
            f"{encoder.name}: timm has no {_described(config)}; it has ViTs, and ResNet-18, -34 and -50 of width "
            f"{STANDARD_WIDTH} and {STANDARD_STAGES} stages; use --to torchvision, safetensors or onnx"
        )
    try:
        importlib.import_module("timm")
    except ImportError:
        raise ExportError("--to timm: timm is needed to check the file; run `pip install 'genssl[timm]'`") from None
    shown = "".join(f", {key}={value!r}" for key, value in arguments.items())
    lines = f"model = timm.create_model({name!r}, num_classes=0{shown})"
    if isinstance(config, ResNetConfig) and config.stem == "small":
        lines += f"\nmodel.conv1 = torch.nn.Conv2d(3, {STANDARD_WIDTH}, 3, stride=1, padding=1, bias=False)"
        lines += "\nmodel.maxpool = torch.nn.Identity()"
    return _state_dict(encoder, "timm", lines)


def _safetensors(encoder: LoadedEncoder, config: ComponentConfig) -> _Format:
    metadata = {"format": FORMAT, "backbone": config.model_dump_json(), "source": encoder.name}
    if encoder.image_size is not None:
        metadata["image_size"] = str(encoder.image_size)

    def write(path: Path, suffix: str) -> None:
        write_tensors(path, _weights(encoder), metadata)

    def read(path: Path, suffix: str) -> Read:
        return load_own(path)[0].eval()

    def usage(path: Path) -> str:
        imports = "import torch\nfrom genssl.encoders.load import load_encoder\n\n"
        return f"{imports}model = load_encoder({str(path)!r}, torch.device('cpu')).module"

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

    def usage(path: Path) -> str:
        return f"import numpy\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession({str(path)!r})"

    images = "numpy.random.default_rng(0).random((2, 3, {size}, {size}), dtype='float32')"
    return _Format(write, read, usage, images, "(features,) = session.run(['features'], {'images': images})")


def _is_standard(config: ComponentConfig) -> TypeGuard[ResNetConfig]:
    """Whether it is, but for its stem, one of torchvision's and timm's ResNets; neither has one of ten layers."""
    size = (STANDARD_WIDTH, STANDARD_STAGES)
    return isinstance(config, ResNetConfig) and config.name != "resnet10" and (config.width, config.stages) == size


def _described(config: ComponentConfig) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in config.model_dump(mode="json").items() if name != "name")
    return f"{config.name} ({settings})"
