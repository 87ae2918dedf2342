"""Random networks of a diffusers pipeline, small enough for a test: what the pipelines of several tests are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)


def vision_encoder(projection_dim: int = 32) -> CLIPVisionModelWithProjection:
    """An image encoder of 32 px whose embedding has `projection_dim` numbers."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            projection_dim=projection_dim,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            intermediate_size=37,
            patch_size=8,
        )
    )


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet with cross-attention of 32 numbers for latents of 4 channels, 8 px."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32,
    }
    return UNet2DConditionModel(**settings | changes)


def vae() -> AutoencoderKL:
    """An autoencoder of 64 px to 8 px."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def scheduler(**changes: Any) -> DDIMScheduler:
    """Stable Diffusion 1's noise schedule with DDIM steps."""
    settings: dict[str, Any] = {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**settings | changes)


def tokenizer(scratch: Path) -> tuple[CLIPTokenizer, CLIPTextConfig]:
    """A tokenizer of single characters, whose files go to `scratch`, and the config of a text encoder for it."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    scratch.mkdir()
    (scratch / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (scratch / "merges.txt").write_text("#version: 0.2\n")
    made = CLIPTokenizer(str(scratch / "vocab.json"), str(scratch / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    return made, config
