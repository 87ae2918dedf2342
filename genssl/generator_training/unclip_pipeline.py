"""Writes a trained Stable unCLIP as a diffusers folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffusers import StableUnCLIPImg2ImgPipeline
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from genssl.base.devices import seeded_initialisation
from genssl.config.generator_recipes.unclip import StableUnCLIPRecipe
from genssl.data.base import ImageDataset
from genssl.generator_training.loop import Loop
from genssl.generator_training.unclip import TEXT_WIDTH, TrainedUnCLIP, train_unclip
from genssl.generators.conditioner import FILE
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.loading import quiet_libraries

TOKENS = 8
# Few steps and no guidance, which small models need, and twice as fast.
LOOKED_AT_WITH: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}


def train_and_save(recipe: StableUnCLIPRecipe, train: ImageDataset, loop: Loop, folder: Path) -> StableUnCLIPConfig:
    """Trains the networks and writes the pipeline into `folder`; see `Family.trainer`."""

    def save(trained: TrainedUnCLIP, place: Path) -> StableUnCLIPConfig:
        if trained.image_encoder is None and place != folder:
            shutil.copyfile(folder / FILE, place / FILE)
        _save_pipeline(trained, place, train.image_size, recipe.seed)
        return StableUnCLIPConfig(model=str(place), **LOOKED_AT_WITH)

    trained = train_unclip(recipe, train, loop, folder, save)
    return save(trained, folder) if loop.ranks.first else StableUnCLIPConfig(model=str(folder))


def _save_pipeline(trained: TrainedUnCLIP, folder: Path, image_size: int, seed: int) -> None:
    """Writes the trained parts, and a text path that says nothing, as a StableUnCLIPImg2ImgPipeline.

    One with a conditioner, whose `encoder.safetensors` stands in the folder already, has no image encoder of diffusers.
    """
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
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=half,
        image_std=half,
    )
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None if trained.image_encoder is None else processor,
        image_encoder=trained.image_encoder,
        image_normalizer=trained.normalizer,
        image_noising_scheduler=trained.noising,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=trained.denoiser,
        scheduler=trained.scheduler,
        vae=trained.autoencoder,
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
