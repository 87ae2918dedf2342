"""Trains a small Stable unCLIP from images alone: image encoder by SimCLR, KL autoencoder, denoiser; no labels.

The result is an ordinary diffusers folder: `StableUnCLIPImg2ImgPipeline.from_pretrained` loads it, and so does
`generator: {name: stable_unclip, model: DIR}`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from genssl.base.devices import seeded_initialisation
from genssl.base.gather import gather
from genssl.config.generator_recipes.unclip import ImageEncoderConfig, StableUnCLIPRecipe
from genssl.generator_training.autoencoder import (
    autoencoder_batches,
    autoencoder_problems,
    given_autoencoder,
    make_autoencoder,
    side_factor,
)
from genssl.generator_training.conditioner import conditioner_batches, conditioner_problems, embed_all, make_conditioner
from genssl.generator_training.family import NORM_GROUPS, GeneratorTraining, channel_problems
from genssl.generator_training.loop import Loop, fit
from genssl.generator_training.rows import CLEAN_PART, Draws, Images, Latents
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.loading import quiet_libraries
from genssl.generators.diffusion.stable_unclip import noise_embeddings
from genssl.methods.losses import nt_xent
from genssl.views.augment import Augment

# The text path of the pipeline exists but says nothing: one constant, empty prompt.
TEXT_WIDTH, TOKENS = 8, 8
# Few steps and no guidance, which small models need, and twice as fast.
LOOKED_AT_WITH: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}


class StableUnCLIPTraining(GeneratorTraining[StableUnCLIPRecipe]):
    """Trains the image encoder or conditioner, the autoencoder, and the denoiser, one after the other."""

    about = (
        "A miniature Stable unCLIP. It is an ordinary diffusers folder (`StableUnCLIPImg2ImgPipeline`); image encoder, "
        "autoencoder and denoiser are trained, the text path is a random constant that the denoiser does not read."
    )
    _given: AutoencoderKL | None
    _image_encoder: CLIPVisionModelWithProjection | None = None  # None where a conditioner takes its place
    _autoencoder: AutoencoderKL
    _normalizer: StableUnCLIPImageNormalizer
    _noising: DDPMScheduler
    _scheduler: DDIMScheduler

    def prepare(self) -> list[str]:
        """See the base class."""
        recipe, size = self.recipe, self.dataset.image_size
        self._given = given_autoencoder(recipe.autoencoder)
        factor = side_factor(recipe.autoencoder, self._given)
        problems, batches = [], {"denoiser": recipe.denoiser.batch_size}
        if size % 8:
            problems.append(f"dataset.image_size: {size} is not a multiple of 8, which the diffusers pipeline asks for")
        if recipe.conditioner is None:
            problems += _encoder_problems(recipe.image_encoder, size)
            batches["image_encoder"] = recipe.image_encoder.batch_size
        else:
            problems += conditioner_problems(recipe.conditioner)
            batches |= conditioner_batches(recipe.conditioner)
        problems += autoencoder_problems(recipe.autoencoder)
        channels = recipe.denoiser.block_out_channels
        problems += channel_problems("denoiser", channels)
        if size % (factor * 2 ** (len(channels) - 1)):
            problems.append(
                f"denoiser.block_out_channels: {len(channels)} levels do not fit latents of {size // factor} pixels"
            )
        return problems + self.batch_problems(**batches, **autoencoder_batches(recipe.autoencoder))

    def train(self, images: Images) -> nn.Module:
        """See the base class."""
        recipe, loop = self.recipe, self.loop
        with seeded_initialisation(recipe.seed, "unclip"):
            if recipe.conditioner is None:
                self._image_encoder = encoder = train_image_encoder(recipe, images, loop)
                with torch.inference_mode():
                    pixels = (2 * part.float() / 255 - 1 for part in images.parts(range(len(images))))
                    embeddings = torch.cat([encoder(part).image_embeds for part in pixels]).cpu().clone()
            else:
                conditioner = make_conditioner(recipe.conditioner, images, recipe.seed, loop, self.folder)
                embeddings = embed_all(conditioner, images, loop.ranks)
            self._autoencoder = make_autoencoder(recipe.autoencoder, self._given, images, recipe.seed, loop)
            return self._train_denoiser(images, embeddings)

    def _train_denoiser(self, images: Images, embeddings: torch.Tensor) -> nn.Module:
        """Trains the UNet to predict v on latents, given the image's noised embedding; returns averaged weights."""
        config, loop, device = self.recipe.denoiser, self.loop, self.loop.device
        # --- networks ---
        latents = Latents(self._autoencoder, images)
        self._normalizer = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1])
        self._normalizer.mean.data.copy_(embeddings.mean(dim=0, keepdim=True))
        self._normalizer.std.data.copy_(embeddings.std(dim=0, keepdim=True))
        self._normalizer.requires_grad_(False)
        self._noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self._scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )
        levels, channels = len(config.block_out_channels), int(self._autoencoder.config["latent_channels"])
        unet = UNet2DConditionModel(
            sample_size=images.size // 2 ** (len(self._autoencoder.config["block_out_channels"]) - 1),
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            mid_block_type="UNetMidBlock2D",
            block_out_channels=tuple(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            norm_num_groups=NORM_GROUPS,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * embeddings.shape[1],
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
        )
        average: nn.Module = loop.averaged(unet)
        # --- training ---
        draws = Draws(self.recipe.seed, "denoiser", ranks=loop.ranks)
        alphas = self._scheduler.alphas_cumprod.to(device)

        def loss_of(rows: torch.Tensor) -> torch.Tensor:
            batch = len(rows)
            noise_levels = draws.integers(0, config.max_noise_level + 1, batch)
            noise_levels[draws.uniform(batch) < CLEAN_PART] = 0
            chosen = embeddings[rows]
            condition = noise_embeddings(
                self._normalizer, self._noising, chosen, draws.normal(*chosen.shape), noise_levels
            )
            condition[draws.uniform(batch) < config.embedding_dropout] = 0
            times = draws.integers(0, len(alphas), batch).to(device)
            clean = latents[rows]
            noise = draws.normal(*clean.shape).to(device)
            a, b = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
            predicted = unet(
                a * clean + b * noise, times, encoder_hidden_states=None, class_labels=condition.to(device)
            ).sample
            return F.mse_loss(predicted.float(), a * noise - b * clean)

        fit(
            "denoiser",
            unet,
            loss_of,
            config,
            draws,
            loop,
            count=len(images),
            steps=config.steps,
            images=images,
            average=average,
            ema_decay=config.ema_decay,
            publish=self.publish,
        )
        return average

    def write(self, place: Path, network: nn.Module) -> StableUnCLIPConfig:
        """Writes the trained parts, and a text path that says nothing, as a StableUnCLIPImg2ImgPipeline.

        One with a conditioner, whose `encoder.safetensors` stands in the folder already, has no image encoder of
        diffusers.
        """
        size = self.dataset.image_size
        tokenizer = _tokenizer(place)
        with seeded_initialisation("text", self.recipe.seed):
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
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=half,
            image_std=half,
        )
        pipeline = StableUnCLIPImg2ImgPipeline(
            feature_extractor=None if self._image_encoder is None else processor,
            image_encoder=self._image_encoder,
            image_normalizer=self._normalizer,
            image_noising_scheduler=self._noising,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=network,
            scheduler=self._scheduler,
            vae=self._autoencoder,
        )
        with quiet_libraries():
            pipeline.save_pretrained(place, safe_serialization=True)
        return StableUnCLIPConfig(model=str(place), **LOOKED_AT_WITH)


def _encoder_problems(config: ImageEncoderConfig, size: int) -> list[str]:
    problems = []
    if size % config.patch_size:
        problems.append(f"image_encoder.patch_size: {config.patch_size} does not divide the image size {size}")
    if config.hidden_size % config.num_heads:
        problems.append(
            f"image_encoder.hidden_size: {config.hidden_size} is not a multiple of num_heads, {config.num_heads}"
        )
    return problems


def train_image_encoder(recipe: StableUnCLIPRecipe, images: Images, loop: Loop) -> CLIPVisionModelWithProjection:
    """Trains a CLIP vision transformer by SimCLR; NT-Xent sees the projected embedding through a small head."""
    config = recipe.image_encoder
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            projection_dim=config.embedding_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=images.size,
            patch_size=config.patch_size,
            hidden_act="gelu",
        )
    )
    head = nn.Sequential(nn.Linear(config.embedding_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))
    both = nn.ModuleList([encoder, head])
    augment = Augment(config.augmentation, images.size)
    draws = Draws(recipe.seed, "image encoder", ranks=loop.ranks)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = images[rows].float() / 255
        first, second = (head(encoder(2 * draws.view(augment, batch) - 1).image_embeds) for _ in range(2))
        return nt_xent(gather(first), gather(second), config.temperature)

    fit("image encoder", both, loss_of, config, draws, loop, count=len(images), epochs=config.epochs, images=images)
    return encoder.eval().requires_grad_(False)


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
