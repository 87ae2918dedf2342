"""Writes official IC-GAN weights as a generator folder: `genssl convert-weights`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from genssl import __version__
from genssl.base.safetensors_file import write_tensors
from genssl.errors import UserError
from genssl.generators.icgan.generator import CLASS, FORMAT, WEIGHTS
from genssl.generators.icgan.networks import Architecture
from genssl.generators.icgan.official import FILE as FEATURES
from genssl.generators.icgan.official import Preprocess, convert_features, convert_generator, read_tensors

LICENCE = "CC-BY-NC-4.0"


def convert_weights(checkpoint: Path, features: Path, folder: Path, preprocess: Preprocess) -> Architecture:
    """Writes a folder that `generator: {name: icgan, model: DIR}` takes, whole or not at all.

    Args:
        checkpoint: an official `G_ema_best*.pth`.
        features: the ResNet-50 that the model was trained with: SwAV's `swav_800ep_pretrain.pth.tar`, or torchvision's
            ResNet-50 for a class-conditional model.
        folder: written; refused if it exists.
        preprocess: how a source is shown to the ResNet, see `ResNetFeatures`.

    Raises:
        UserError: if the folder exists or cannot be made, or a file is of another network or holds code.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; give another folder with --out, or remove it")
    architecture, weights = convert_generator(read_tensors(checkpoint))
    trunk = convert_features(read_tensors(features))
    width = trunk["layer4.2.conv3.weight"].shape[0]
    if architecture.feature_dim != width:
        raise UserError(f"{checkpoint}: takes {architecture.feature_dim} features, and a ResNet-50 makes {width}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be created ({error.strerror})") from None
    try:
        write_tensors(partial / WEIGHTS, weights)
        write_tensors(partial / FEATURES, trunk)
        facts = {
            "_class_name": CLASS,
            "format": FORMAT,
            "architecture": architecture.to_json(),
            "preprocess": preprocess,
        }
        (partial / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
        card = {
            "licence": LICENCE,
            "converted_by": f"genssl {__version__}, torch {torch.__version__}",
            "checkpoint": checkpoint.name,
            "features": features.name,
        }
        (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        partial.chmod(0o755)
        for path in partial.iterdir():
            path.chmod(0o644)
        os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return architecture


def describe(architecture: Architecture) -> str:
    """Returns one line for people: resolution, channels, conditioning."""
    kind = f"class-conditional ({architecture.classes} classes)" if architecture.classes else "without classes"
    return (
        f"{architecture.resolution} px, last block of {architecture.channels[-1]} channels, "
        f"noise {architecture.noise_dim}, features {architecture.feature_dim}, {kind}"
    )
