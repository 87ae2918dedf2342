"""A random flow on disk: networks of a few thousand weights, no training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from genssl.backbones.configs import ResNet18Config
from genssl.generators.conditioner import FILE, save_encoder
from genssl.generators.flow import CLASS, WEIGHTS, build_network
from genssl.registry import BACKBONES

FACTS = {
    "_class_name": CLASS,
    "format": "genssl-flow/1",
    "image_size": 16,
    "embedding_dim": 32,
    "max_embedding_noise": 2.0,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
}


def build_tiny_flow(folder: Path, seed: int = 0) -> Path:
    """Writes the model and returns its folder; encoder input and images have 16 px."""
    folder.mkdir(parents=True)
    block = ResNet18Config(stem="small", width=4)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_encoder(folder / FILE, BACKBONES.get("resnet18")(block), block, image_size="16")
        network = build_network(FACTS)
        for parameter in network.parameters():  # so that time, image and condition all reach the output
            parameter.data.mul_(1.5)
    save_file(network.state_dict(), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(FACTS))
    return folder
