"""Finds the network in a checkpoint of another tool, builds it, and says what its tensors could not tell.

Of several networks in a file the one is taken that the tool itself evaluates: timm's averaged weights, the teacher of
DINO and its like, otherwise the network that is trained. The momentum networks of MoCo and BYOL are passed over.

What tensors alone would not tell is known of some tools:

- solo-learn pads the small-image stem by 2. Its mark is the online `classifier` beside a projector, predictor,
  momentum network and so on.
- lightly's Sequential of the children of its own ResNet has no ReLU after the stem's batch norm.
- MoCo v3's ViT-Small has 12 heads, as have solo-learn's ViTs for MoCo v3 and MAE.
- genssl's own runs take images as they are (`method.backbone.*` in a checkpoint.pt).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genssl.backbones.configs import ResNetConfig, ViTConfig
from genssl.backbones.vit import HEAD_CHANNELS
from genssl.base.devices import seeded_initialisation
from genssl.config.base import ComponentConfig
from genssl.config.encoder import EncoderConfig, encoder_block
from genssl.encoders.foreign import (
    MOCO_V3_HEADS,
    EncoderError,
    Tensors,
    fixed_positions,
    renamed,
    resnet_config,
    resnets,
    shape,
    unwrapped,
    vit_config,
    vits,
)
from genssl.registry import BACKBONES

OWN = "method.backbone."  # in a checkpoint.pt of genssl, whose encoders take images as they are
AVERAGED = re.compile(r"(state_dict_ema|model_ema)\.")  # timm's, DeiT's
MOMENTUM = re.compile(r"momentum|target|(_k|key)\.")
# What a network has no features from: heads, and what is trained beside it.
HEADS = re.compile(
    r"(fc|head|heads|classifier|linear|last_linear|projector|projection_head|predictor|prototypes|mask_token|"
    r"masked_embed|decoder\w*)(\.|$)"
)
SOLO_LEARN = (
    "projector", "predictor", "prototypes", "head", "decoder", "momentum_backbone", "momentum_encoder"
)  # fmt: skip
# Names of networks whose tensors are those of a plain ResNet or ViT, or nearly, and whose features are others.
OTHERS = re.compile(r"blur|resnetaa|resnet\d+[cdst](?![a-z\d])|quick_?gelu|=", re.IGNORECASE)
Statistics = str | tuple[Sequence[float], Sequence[float]]
NAMED = 4  # of the tensors that do not fit, as many are named


@dataclass(frozen=True)
class ForeignBackbone:
    """A backbone with the weights of a checkpoint, on the CPU.

    The facts say, for people and provenance, what was concluded from the file or assumed, such as prefix and stem.
    """

    network: nn.Module
    config: ComponentConfig
    normalize: Statistics
    facts: dict[str, str]


def foreign_backbone(path: Path, tensors: Tensors, asked: EncoderConfig, itself: str | None = None) -> ForeignBackbone:
    """Finds the backbone among the tensors of a file and builds it.

    Args:
        path: for messages.
        tensors: by key path.
        asked: what the user knows of it. With a backbone nothing is concluded from the framework's habits.
        itself: what the file calls its network, see `read_checkpoint`.

    Raises:
        EncoderError: if there is none, it is of another architecture, tensors are missing or left over, or there are
            several networks to choose from.
    """
    tensors = unwrapped(tensors)
    network: Any = None if asked.backbone is None else _build(asked.backbone)
    if asked.backbone is not None and (asked.heads, asked.stem_padding) != (None, None):
        raise EncoderError(f"{path}: heads and stem_padding go with a backbone that is not named; leave them out")
    candidates = _candidates(path, tensors, network, asked)
    prefix, passed_over = _chosen(path, tensors, candidates, asked)
    layout = candidates[prefix]
    nested = tuple(other for other in candidates if other.startswith(prefix) and other != prefix)
    weights = renamed(_below(tensors, prefix, nested), layout)
    facts = {"says itself": itself} if itself else {}
    facts |= {"prefix": prefix or "none", "layout": layout}
    if passed_over:
        facts["passed over"] = ", ".join(other or "no prefix" for other in passed_over)
    statistics: Statistics = "imagenet"
    if asked.backbone is not None:
        config, facts["statistics"] = asked.backbone, "imagenet (assumed)"
        if (own := getattr(network, "pretrained_cfg", None)) is not None:
            statistics, facts["statistics"] = (own["mean"], own["std"]), f"timm's for {config.name}"
    elif layout == "vit":
        config, told = _vit(path, tensors, prefix, weights, asked)
        network, facts = _build(config), facts | told
    else:
        config, padding, statistics, told = _resnet(path, tensors, prefix, weights, asked)
        network, facts = _build(config), facts | told
        network.conv1.padding = (padding, padding)
        if layout == "lightly children":
            network.relu = nn.Identity()
            facts["stem"] += ", no ReLU after the first norm (as lightly's children)"
    if prefix == OWN:
        statistics, facts["statistics"] = "none", "none (genssl's own)"
        for known in ("blocks", "activation"):
            facts.pop(known, None)
    if asked.backbone is None and itself and OTHERS.search(itself):
        raise _another(path, itself, config)
    _load(path, network, weights, config)
    return ForeignBackbone(network, config, statistics, facts)


def _another(path: Path, itself: str, config: ComponentConfig) -> EncoderError:
    """Returns the refusal of a file whose name for its network tells what its tensors do not."""
    plain = encoder_block(str(path), backbone=f"{{name: {config.name}}}")
    timms = f"{{name: timm/{itself.removeprefix('timm/')}}}"
    named = "" if "=" in itself else f" if timm has it, name it: {encoder_block(str(path), backbone=timms)};"
    return EncoderError(
        f"{path}: says that it is {itself}, and its tensors would fit {config.name}, whose features are others;"
        f"{named} if it is a plain {config.name} all the same, say so, with its settings: {plain}"
    )


def _candidates(path: Path, tensors: Tensors, network: nn.Module | None, asked: EncoderConfig) -> dict[str, str]:
    """Returns the layouts of the networks among the tensors, by prefix."""
    if network is None:
        found = resnets(tensors) | vits(tensors)
    else:
        names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
        if "patch_embed.proj.weight" in names:
            found = vits(tensors)
        else:
            ends = {key[: -len(names[0])] for key in tensors if key.endswith(names[0])}
            found = {prefix: "" for prefix in ends if all(f"{prefix}{name}" in tensors for name in names)}
        if not found:
            ends = {key[: -len(names[0])] for key in tensors if key.endswith(names[0])}
            nearest = max(ends, key=lambda prefix: sum(f"{prefix}{name}" in tensors for name in names), default="")
            missing = next((name for name in names if f"{nearest}{name}" not in tensors), names[0])
            what = asked.backbone.name if asked.backbone is not None else ""
            raise EncoderError(f"{path}: is not a {what}: {missing} is not among its {len(tensors)} tensors")
    if not found:
        raise EncoderError(
            f"{path}: no ResNet and no ViT is among its {len(tensors)} tensors, such as {min(tensors)}; if timm has "
            f"the network, name it: {encoder_block(str(path), backbone='{name: timm/convnext_tiny}')}"
        )
    return found


def _chosen(path: Path, tensors: Tensors, candidates: dict[str, str], asked: EncoderConfig) -> tuple[str, list[str]]:
    """Returns the prefix of the network that is meant, and those of the others; refuses equally likely ones."""
    usable = sorted(candidates)
    if asked.prefix is not None:
        wanted = ".".join([*filter(None, asked.prefix.split(".")), ""])
        usable = [prefix for prefix in usable if prefix.startswith(wanted)]
        if not usable:
            raise EncoderError(
                f"{path}: has no network below {wanted}; it has {', '.join(sorted(candidates)) or 'one without prefix'}"
            )
    averaged = [prefix for prefix in usable if AVERAGED.match(prefix)]
    usable = averaged or usable
    usable = [prefix for prefix in usable if not MOMENTUM.search(prefix)] or usable
    teachers = [prefix for prefix in usable if "teacher" in prefix]
    # A teacher of another kind than its student is one that knowledge is distilled from, and not the student's average.
    if teachers and len({_shapes(tensors, prefix, candidates[prefix]) for prefix in usable}) == 1:
        usable = teachers
    elif not teachers:
        usable = [prefix for prefix in usable if "student" not in prefix] or usable
    if len(usable) > 1:
        example = encoder_block(str(path), prefix=usable[0].rstrip(".") or "PREFIX")
        raise EncoderError(f"{path}: holds {len(usable)} networks, {', '.join(usable)}; choose one, such as {example}")
    return usable[0], [prefix for prefix in sorted(candidates) if prefix != usable[0]]


def _shapes(tensors: Tensors, prefix: str, layout: str) -> frozenset[tuple[str, torch.Size]]:
    weights = renamed(_below(tensors, prefix), layout)
    return frozenset((name, value.shape) for name, value in weights.items() if not HEADS.match(name))


def _below(tensors: Tensors, prefix: str, nested: tuple[str, ...] = ()) -> Tensors:
    """Returns the tensors of a network under its own names, without those of networks inside it."""
    return {
        key[len(prefix) :]: value
        for key, value in tensors.items()
        if key.startswith(prefix) and not (nested and key.startswith(nested))
    }


def _beside(tensors: Tensors, prefix: str, name: str) -> bool:
    """Whether a module stands beside the backbone."""
    start = re.sub(r"[^.]+\.$", f"{name}.", prefix)
    return any(key.startswith(start) for key in tensors)


def _is_solo_learns(tensors: Tensors, prefix: str) -> bool:
    """Whether an online classifier is beside a backbone, and what else solo-learn's methods train."""
    if not re.search(r"(^|\.)(backbone|encoder)\.$", prefix):
        return False
    return _beside(tensors, prefix, "classifier") and any(_beside(tensors, prefix, name) for name in SOLO_LEARN)


def _vit(
    path: Path, tensors: Tensors, prefix: str, weights: Tensors, asked: EncoderConfig
) -> tuple[ViTConfig, dict[str, str]]:
    """Returns the config, and what is said of it."""
    if asked.stem_padding is not None:
        raise EncoderError(f"{path}: holds a ViT, whose stem is not padded; leave stem_padding out")
    positions = weights.get("pos_embed")
    fixed = fixed_positions(positions) if positions is not None and positions.ndim == 3 else None
    heads, why = asked.heads, "as given"
    if heads is None:
        why = "assumed, one for 64 channels"
        if re.search(r"(base|momentum)_encoder\.$", prefix) or fixed == "MoCo v3":
            heads, why = MOCO_V3_HEADS, "as MoCo v3's"
        elif fixed == "MAE" and _is_solo_learns(tensors, prefix):
            heads, why = MOCO_V3_HEADS, "as solo-learn's for MAE"
        if len(weights["patch_embed.proj.weight"]) > 768:
            heads = None  # 16 of 64 channels for all
    config = vit_config(path, weights, heads)
    return config, {
        "heads": f"{config.heads or config.channels // HEAD_CHANNELS} ({why})",
        "activation": "GELU (assumed)",
        "image": f"{config.image_size} pixels (assumed, a square)",
        "features": "the class token after the last norm (assumed)",
        "statistics": "imagenet (assumed)",
    }


def _resnet(
    path: Path, tensors: Tensors, prefix: str, weights: Tensors, asked: EncoderConfig
) -> tuple[ResNetConfig, int, str, dict[str, str]]:
    """Returns the config, the padding of the stem, the statistics, and what is said of them."""
    config = resnet_config(path, weights)
    if asked.heads is not None:
        raise EncoderError(f"{path}: holds a {config.name}, which has no heads; leave them out")
    blocks = {"blocks": "ReLU, strides of the standard network, no anti-aliasing (assumed)"}
    if config.stem != "small":
        if asked.stem_padding is not None:
            raise EncoderError(f"{path}: has no stem for small images; leave stem_padding out")
        told = {"stem": "stride 2, padded by 3, pooled (assumed)", "statistics": "imagenet (assumed)"}
        return config, 3, "imagenet", blocks | told
    classes = tensors.get(re.sub(r"[^.]+\.$", "classifier.weight", prefix))
    if classes is not None and len(classes) in (10, 100) and _is_solo_learns(tensors, prefix):
        # Only for CIFAR has solo-learn a small stem.
        why, padding, statistics = "as solo-learn's for CIFAR", 2, f"cifar{len(classes)}"
    else:
        why, padding, statistics = "assumed", 1, "imagenet"
    stem = f"stride 1, padded by {padding} ({why})"
    if asked.stem_padding is not None:
        padding, stem = asked.stem_padding, f"stride 1, padded by {asked.stem_padding} (as given)"
    return config, padding, statistics, blocks | {"stem": stem, "statistics": f"{statistics} ({why})"}


def _build(config: ComponentConfig) -> nn.Module:
    with seeded_initialisation("encoder"):  # the first weights are overwritten; the global stream stays as it is
        network: nn.Module = BACKBONES.get(config.name)(config)
    return network


def _load(path: Path, network: nn.Module, weights: Tensors, config: ComponentConfig) -> None:
    """Loads the weights if each has its place and each place its weights; refuses others, and names them."""
    own = network.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in own and not HEADS.match(name)]
    if missing or extra:
        said = [f"{_named(names)} {what}" for names, what in ((missing, "missing"), (extra, "left over")) if names]
        raise EncoderError(
            f"{path}: is not a {config.name}, with {' and '.join(said)}, so its features would be others; if timm has "
            f"the network, name it: {encoder_block(str(path), backbone='{name: timm/NAME}')}"
        )
    for name, value in own.items():
        if name in weights and weights[name].shape != value.shape:
            raise EncoderError(
                f"{path}: is not a {config.name} of the backbone's settings: {name} is {shape(weights[name])} and not "
                f"{shape(value)}"
            )
    network.load_state_dict(own | {name: weights[name] for name in own if name in weights})


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
