"""Checkpoints that other tools wrote: read without running what is in them, and renamed to names that genssl knows.

Names become torchvision's for ResNets and timm's for ViTs:

- lightly: a Sequential of a ResNet's children. Its own ResNet has no ReLU among them, since that is a function in its
  `forward`, and its shortcuts have another name. Split batch norms keep statistics of every split; the mean of them is
  what lightly evaluates with.
- DINOv2: blocks in chunks, `blocks.0.3.`, and register tokens that have no position, as timm's `no_embed_class`.
- torch.compile, DistributedDataParallel, FSDP and activation checkpointing: names of their own in between.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import shlex
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from genssl.backbones.configs import (
    ResNet10Config,
    ResNet18Config,
    ResNet34Config,
    ResNet50Config,
    ResNetConfig,
    ViTBaseConfig,
    ViTConfig,
    ViTLargeConfig,
    ViTSmallConfig,
    ViTTinyConfig,
)
from genssl.base.saved_state import DamagedError, check_digest
from genssl.config.base import ComponentConfig
from genssl.config.encoder import encoder_block
from genssl.errors import UserError

Tensors = dict[str, torch.Tensor]
NAMES = ("arch", "architecture", "model_name", "model")  # under which tools keep a network's name, as text
CHANGES = ("act_layer", "aa_layer", "output_stride")  # of timm's `--model-kwargs`: another network of the same tensors

# Takes what a checkpoint holds of tensors; for people who trust a file that `read_checkpoint` does not.
EXTRACT = """import torch
c = torch.load({given!r}, map_location='cpu', weights_only=False)
tensors = lambda v: v.state_dict() if isinstance(v, torch.nn.Module) else \
{{k: tensors(x) for k, x in v.items()}} if isinstance(v, dict) else v if isinstance(v, torch.Tensor) else 0
torch.save(tensors(c), {wanted!r})"""
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
RESNETS: dict[tuple[bool, tuple[int, ...]], Any] = {  # by bottleneck or not, and blocks a stage
    (False, (1, 1, 1, 1)): ResNet10Config,
    (False, (2, 2, 2, 2)): ResNet18Config,
    (False, (3, 4, 6, 3)): ResNet34Config,
    (True, (3, 4, 6, 3)): ResNet50Config,
}
VITS: tuple[Any, ...] = (ViTTinyConfig, ViTSmallConfig, ViTBaseConfig, ViTLargeConfig)
# Where `nn.Sequential(*list(resnet.children())[:-1])` has the parts: of torchvision's ResNet, and of lightly's.
CHILDREN = {
    "torchvision children": {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"},
    "lightly children": {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"},
}
MOCO_V3_HEADS = 12  # of its ViTs of up to 768 channels, and of solo-learn's for MoCo v3 and MAE


class EncoderError(UserError):
    """An encoder that is absent, cannot be read, or does not fit its network."""


def read_checkpoint(path: Path) -> tuple[Tensors, str | None]:
    """Returns all tensors of a file that `torch.save` wrote, named by their key paths, and what it calls its network.

    Runs no code of the file. The network's name is None where the file has none, and otherwise text such as
    "resnetblur18" or "resnet18, output_stride=16".

    Beside tensors and plain data it may hold `argparse.Namespace`, in which timm, DINO, MAE and others keep settings.

    Raises:
        EncoderError: if it is no such file, or holds other Python objects.
    """
    try:
        with warnings.catch_warnings():  # about protocols of pickle, beside the error that follows
            warnings.simplefilter("ignore", UserWarning)
            check_digest(path)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedError as error:
        raise EncoderError(f"{path}: is damaged ({error}); get it again, or take another checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            wanted = path.with_name(f"{path.name.split('.')[0]}-tensors.pth")
            command = shlex.quote(EXTRACT.format(given=str(path), wanted=str(wanted)).replace("\n", "; "))
            raise EncoderError(
                f"{path}: holds a Python object ({named[1].rstrip('.')}), which could run code when it is loaded, so "
                "the file is not opened; ask its author for the state dict alone, or, if you trust it and have the "
                f"packages that it was written with, take the tensors out into {wanted}: python -c {command}"
            ) from None
        raise EncoderError(
            f"{path}: is damaged, or not a file that torch.save wrote ({type(error).__name__}); get it again"
        ) from None
    tensors: Tensors = {}
    _collect(content, (), tensors)
    if not tensors:
        raise EncoderError(f"{path}: holds no tensors; give the checkpoint of an encoder")
    return tensors, _says_itself(content)


def _says_itself(content: Any) -> str | None:
    top = content if isinstance(content, dict) else {}
    held = top.get("args")
    arguments = vars(held) if isinstance(held, argparse.Namespace) else held if isinstance(held, dict) else {}
    found = (place.get(key) for place in (top, arguments) for key in NAMES)
    name = next((one for one in found if isinstance(one, str) and re.fullmatch(r"[\w./-]{1,80}", one)), None)
    held = arguments.get("model_kwargs")
    settings = {key: str(held[key]) for key in CHANGES if held.get(key)} if isinstance(held, dict) else {}
    changed = [f"{key}={value}" for key, value in settings.items() if re.fullmatch(r"[\w.]{1,80}", value)]
    return ", ".join([name or "a network", *changed]) if name or changed else None


def _collect(value: Any, path: tuple[str, ...], into: Tensors) -> None:
    if isinstance(value, torch.Tensor):
        into[".".join(path)] = value.detach()
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, (*path, str(key)), into)


# ---- Layouts ----


def unwrapped(tensors: Tensors) -> Tensors:
    """Returns the tensors without what torch puts into the names of those of wrapped modules."""
    return {WRAPPERS.sub("", key): value for key, value in tensors.items()}


def resnets(tensors: Tensors) -> dict[str, str]:
    """Returns the layout of the ResNets among the tensors, by prefix."""
    found = {}
    for key in tensors:
        if (match := re.fullmatch(r"(|.*\.)layer1\.0\.conv1\.weight", key)) is not None:
            found[match[1]] = "resnet"
        elif (match := re.fullmatch(r"(|.*\.)[24]\.0\.conv1\.weight", key)) and f"{match[1]}0.weight" in tensors:
            lightly = f"{match[1]}2.0.conv1.weight" in tensors
            found[match[1]] = "lightly children" if lightly else "torchvision children"
    return found


def vits(tensors: Tensors) -> dict[str, str]:
    """Returns "vit" by prefix of the ViTs among the tensors."""
    end = "patch_embed.proj.weight"
    return {key[: -len(end)]: "vit" for key in tensors if key == end or key.endswith(f".{end}")}


def renamed(weights: Tensors, layout: str) -> Tensors:
    """Returns the weights of a network under torchvision's or timm's names."""
    if layout == "vit":
        return _vit_names(weights)
    children, found = CHILDREN.get(layout, {}), {}
    for key, value in weights.items():
        first, dot, rest = key.partition(".")
        found[f"{children.get(first, first)}{dot}{rest}".replace(".shortcut.", ".downsample.")] = value
    for key in [key for key in found if key.endswith(("running_mean", "running_var"))]:
        scale = found.get(f"{key.rpartition('.')[0]}.weight")
        if scale is not None and len(found[key]) != len(scale) and len(found[key]) % len(scale) == 0:
            found[key] = found[key].view(-1, len(scale)).mean(dim=0)  # lightly's split batch norm
    return found


def _vit_names(weights: Tensors) -> Tensors:
    found = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in weights.items()}
    if len(found) < len(weights):  # numbers that begin anew in every chunk: no layout that is known
        return weights
    if {"register_tokens", "cls_token", "pos_embed"} <= found.keys():
        found["reg_token"] = found.pop("register_tokens")
        found["cls_token"] = found["cls_token"] + found["pos_embed"][:, :1]
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def resnet_config(path: Path, weights: Tensors) -> ResNetConfig:
    """Returns the ResNet that the weights are of; refuses one that genssl has not."""
    bottleneck = "layer1.0.conv3.weight" in weights
    counts = tuple(
        1 + max((int(key.split(".")[1]) for key in weights if key.startswith(f"layer{stage}.")), default=-1)
        for stage in (1, 2, 3, 4)
    )
    blocks = counts[: 4 - counts.count(0)]  # a stage that is missing in between stays, and fits nothing
    stem = weights.get("conv1.weight")
    fitting = (
        model for (deep, layers), model in RESNETS.items() if deep == bottleneck and layers[: len(blocks)] == blocks
    )
    model = next(fitting, None) if blocks else None
    if model is None or stem is None or stem.ndim != 4 or stem.shape[1] != 3 or stem.shape[2] not in (3, 7):
        what = "bottleneck" if bottleneck else "basic"
        raise EncoderError(
            f"{path}: is a ResNet of {what} blocks {list(blocks)} with a stem of {shape(stem)}, which is none of "
            "ResNet-10, -18, -34 and -50; if timm has it, name that: "
            f"{encoder_block(str(path), backbone='{name: timm/resnet101}')}"
        )
    kind = "small" if stem.shape[2] == 3 else "imagenet"
    config: ResNetConfig = _configured(path, model, stem=kind, width=int(stem.shape[0]), stages=len(blocks))
    return config


def vit_config(path: Path, weights: Tensors, heads: int | None) -> ViTConfig:
    """Returns the ViT that the weights are of; refuses one that genssl has not."""
    patches, positions = weights["patch_embed.proj.weight"], weights.get("pos_embed")
    depth = 1 + max((int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    model = next((model for model in VITS if model.channels == len(patches)), None)
    count = positions.shape[1] if positions is not None and positions.ndim == 3 else 0
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    # With registers positions belong to patches alone, as in timm's networks of DINOv2.
    patches_placed = max(0, count if registers else count - 1)
    grid = math.isqrt(patches_placed)
    if model is None or depth == 0 or grid == 0 or grid**2 != patches_placed:
        raise EncoderError(
            f"{path}: is a ViT of {len(patches)} channels and {depth} blocks with positions {shape(positions)}, and "
            f"none of {', '.join(f'{model.__name__[3:-6]} ({model.channels})' for model in VITS)} with a square of "
            "positions; if timm has it, name that: "
            f"{encoder_block(str(path), backbone='{name: timm/vit_huge_patch14_224}')}"
        )
    patch = int(patches.shape[-1])
    settings: dict[str, Any] = {"layer_scale": 1.0} if "blocks.0.ls1.gamma" in weights else {}
    settings |= {"image_size": grid * patch, "patch_size": patch, "depth": depth, "registers": registers}
    config: ViTConfig = _configured(path, model, heads=heads, **settings)
    return config


def _configured(path: Path, model: type[ComponentConfig], **settings: Any) -> Any:
    try:
        return model(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise EncoderError(
            f"{path}: does not hold a {model.__name__[:-6]}: {first['loc'][0]}: {first['msg']}"
        ) from None


def fixed_positions(positions: torch.Tensor) -> str | None:
    """Returns "MoCo v3" or "MAE" if position embeddings [1, 1 + N, C] are the sines and cosines of either, or None."""
    grid, channels = math.isqrt(positions.shape[1] - 1), positions.shape[2]
    if grid**2 + 1 != positions.shape[1] or channels % 4 or positions[:, 0].any():
        return None
    angles = torch.arange(grid)[:, None] / 10000 ** (torch.arange(channels // 4) / (channels // 4))
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(grid, dim=0), waves.repeat(grid, 1)
    for name, parts in (("MoCo v3", (rows, columns)), ("MAE", (columns, rows))):
        if torch.allclose(positions[0, 1:].float(), torch.cat(parts, dim=1), atol=1e-2):  # as halves, too
            return name
    return None


def shape(tensor: torch.Tensor | None) -> str:
    """Returns such as "64x3x7x7"."""
    return "nothing" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"
