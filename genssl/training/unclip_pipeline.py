"""Writes a trained Stable unCLIP as a diffusers folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from genssl.config.unclip_recipe import StableUnCLIPRecipe
from genssl.data.base import ImageDataset
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.loading import quiet_libraries
from genssl.runtime import seeded_initialisation
from genssl.training.fitting import Checkpoints, Report
from genssl.training.unclip import TEXT_WIDTH, TrainedUnCLIP, train_unclip

TOKENS = 8


def train_and_save(
    recipe: StableUnCLIPRecipe, train: ImageDataset, device: torch.device, report: Report, folder: Path
) -> StableUnCLIPConfig:
    """Trains the three networks and writes the pipeline into `folder`; see `Family.trainer`."""
    trained = train_unclip(recipe, train, device, report, Checkpoints(folder))
    _save_pipeline(trained, folder, train.image_size, recipe.seed)
    return StableUnCLIPConfig(model=str(folder))


def _save_pipeline(trained: TrainedUnCLIP, folder: Path, image_size: int, seed: int) -> None:
    """Writes the trained parts, and a text path that says nothing, as a StableUnCLIPImg2ImgPipeline."""
    tokenizer = _tokenizer(folder)
    with seeded_initialisation("text", seed):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    half = [0.5, 0.5, 0.5]
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=half,
            image_std=half,
        ),
        image_encoder=trained.image_encoder.cpu(),
        image_normalizer=trained.normalizer.cpu(),
        image_noising_scheduler=trained.noising,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=trained.denoiser.cpu(),
        scheduler=trained.scheduler,
        vae=trained.autoencoder.cpu(),
    )
    with quiet_libraries():
        pipeline.save_pretrained(folder, safe_serialization=True)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a CLIP tokenizer over printable characters: enough for the empty prompt, and no download."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        token: i
        for i, token in enumerate([*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"])
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        vocab, merges = Path(scratch) / "vocab.json", Path(scratch) / "merges.txt"
        vocab.write_text(json.dumps(vocabulary))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=TOKENS)
