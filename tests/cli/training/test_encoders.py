"""Encoders that a command line names: what is said of those that nobody has trained."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.cli.training.encoders import load_encoders
from genssl.generators.conditioner import save_encoder


def test_random_weights_are_named_whatever_the_width(tmp_path):
    config = ResNet18Config(stem="small", width=4)
    save_encoder(tmp_path / "encoder.safetensors", build_resnet(config), config, image_size="8")
    said = io.StringIO()
    names = (str(tmp_path), "torchvision/squeezenet1_1")
    loaded = load_encoders(names, torch.device("cpu"), Console(file=said, width=40))
    assert tuple(encoder.name for encoder in loaded) == names
    told = "torchvision/squeezenet1_1: has random weights; name some with torchvision/squeezenet1_1:WEIGHTS"
    assert said.getvalue().strip() == told
