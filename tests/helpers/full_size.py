"""Stable unCLIP's public configuration (sd2-community/stable-diffusion-2-1-unclip-small) with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import build_tiny_unclip
from torch import nn

UNET = {
    "sample_size": 96,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 1536,
}
VAE = {
    "sample_size": 768,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def build_full_size_unclip(folder: Path) -> Path:
    """Writes a pipeline of 1.9 GB in bfloat16: denoiser and autoencoder of full size, small encoders of full width."""
    build_tiny_unclip(folder, width=768, text_width=1024)
    for name, kind, config in (("unet", UNet2DConditionModel, UNET), ("vae", AutoencoderKL, VAE)):
        with torch.device("meta"):
            model = kind(**config)
        model = fill(model.to(torch.bfloat16).to_empty(device="cpu"))
        for file in (folder / name).iterdir():
            file.unlink()
        model.save_pretrained(folder / name)
    return folder


def fill(model: nn.Module) -> nn.Module:
    """Gives a network weights of a usual size, in a second: from one block of noise, over and over."""
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                block = (noise / (value[0].numel() ** 0.5)).to(value.dtype)
                flat = value.view(-1)
                for start in range(0, len(flat), len(block)):
                    part = flat[start : start + len(block)]
                    part.copy_(block[: len(part)])
            else:
                value.fill_(float(name.endswith("weight")))
    return model
