"""Trains a small Stable unCLIP from images alone: image encoder by SimCLR, KL autoencoder, denoiser; no labels.

The result is an ordinary diffusers folder: `StableUnCLIPImg2ImgPipeline.from_pretrained` loads it, and so does
`generator: {name: stable_unclip, model: DIR}`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from genssl.base.devices import seeded_initialisation
from genssl.base.gather import gather
from genssl.base.ranks import Ranks
from genssl.config.generator_recipes.unclip import ImageEncoderConfig, StableUnCLIPRecipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.generator_training.autoencoder import (
    Latents,
    autoencoder_batches,
    autoencoder_problems,
    given_autoencoder,
    make_autoencoder,
    side_factor,
)
from genssl.generator_training.conditioner import conditioner_batches, conditioner_problems, embed_all, make_conditioner
from genssl.generator_training.loop import NORM_GROUPS, Loop, average_into, batch_problems, channel_problems, fit
from genssl.generator_training.rows import Batches, Draws, Images
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.stable_unclip import noise_embeddings
from genssl.methods.losses import nt_xent
from genssl.views.augment import Augment

# The text path of the pipeline exists but says nothing: one constant, empty prompt.
TEXT_WIDTH = 8
CLEAN_PART = 1 / 3  # of the rows sees nearly clean embeddings, the noise level that most users ask for


@dataclass(frozen=True)
class TrainedUnCLIP:
    """The trained parts of the pipeline; `image_encoder` is None where a conditioner takes its place."""

    image_encoder: CLIPVisionModelWithProjection | None
    normalizer: StableUnCLIPImageNormalizer
    autoencoder: AutoencoderKL
    denoiser: nn.Module
    noising: DDPMScheduler
    scheduler: DDIMScheduler


Save = Callable[[TrainedUnCLIP, Path], StableUnCLIPConfig]
"""Writes the parts as a generator into an existing folder."""


def train_unclip(
    recipe: StableUnCLIPRecipe, dataset: ImageDataset, loop: Loop, folder: Path, save: Save | None = None
) -> TrainedUnCLIP:
    """Trains the networks one after the other.

    Args:
        recipe: sizes and lengths.
        dataset: the train split; only its images are used.
        loop: device, precision, ranks, checkpoints.
        folder: of the generator that is being made; a conditioner is written into it.
        save: writes a generator, for `loop.watch`.

    Raises:
        ConfigError: if sizes do not fit each other or the data set.
        UserError: if an encoder or autoencoder cannot be read, or a loss is not finite.
    """
    given = given_autoencoder(recipe.autoencoder)
    _check_sizes(recipe, dataset, loop.ranks, given)
    images = Images(dataset, loop.device)
    encoder: CLIPVisionModelWithProjection | None = None
    with seeded_initialisation(recipe.seed, "unclip"):
        if recipe.conditioner is None:
            encoder = train_image_encoder(recipe, images, loop)
            with torch.inference_mode():
                pixels = (2 * part.float() / 255 - 1 for part in images.parts(range(len(images))))
                embeddings = torch.cat([encoder(part).image_embeds for part in pixels]).cpu().clone()
        else:
            conditioner = make_conditioner(recipe.conditioner, images, recipe.seed, loop, folder)
            embeddings = embed_all(conditioner, images, loop.ranks)
        autoencoder = make_autoencoder(recipe.autoencoder, given, images, recipe.seed, loop)
        return train_denoiser(recipe, images, embeddings, encoder, autoencoder, loop, save)


def _check_sizes(recipe: StableUnCLIPRecipe, dataset: ImageDataset, ranks: Ranks, given: AutoencoderKL | None) -> None:
    size, factor = dataset.image_size, side_factor(recipe.autoencoder, given)
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
    problems += batch_problems(recipe, len(dataset), ranks, **batches, **autoencoder_batches(recipe.autoencoder))
    if problems:
        raise ConfigError(problems)


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
    loop.prepare(both)
    augment = Augment(config.augmentation, images.size)
    draws = Draws(recipe.seed, "image encoder", ranks=loop.ranks)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = images[rows].float() / 255
        first, second = (head(encoder(2 * draws.view(augment, batch) - 1).image_embeds) for _ in range(2))
        return nt_xent(gather(first), gather(second), config.temperature)

    steps = config.epochs * (len(images) // config.batch_size)
    rows = Batches(len(images), config.batch_size, draws)
    for _ in fit("image encoder", both, loss_of, rows, steps, config.lr, loop, images=images):
        pass
    return encoder.eval().requires_grad_(False)


def train_denoiser(
    recipe: StableUnCLIPRecipe,
    images: Images,
    embeddings: torch.Tensor,
    encoder: CLIPVisionModelWithProjection | None,
    autoencoder: AutoencoderKL,
    loop: Loop,
    save: Save | None = None,
) -> TrainedUnCLIP:
    """Trains the UNet to predict v on latents, given the image's noised embedding; returns averaged weights.

    Args:
        recipe: sizes and lengths.
        images: of the train split.
        embeddings: float32 [N, D] of them, on the CPU.
        encoder: what made the embeddings, or None for a conditioner; part of the result.
        autoencoder: of the latents.
        loop: device, precision, ranks, checkpoints.
        save: writes a generator, for `loop.watch`.
    """
    config, device = recipe.denoiser, loop.device
    latents = Latents(autoencoder, images)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1])
    normalizer.mean.data.copy_(embeddings.mean(dim=0, keepdim=True))
    normalizer.std.data.copy_(embeddings.std(dim=0, keepdim=True))
    normalizer.requires_grad_(False)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    levels, channels = len(config.block_out_channels), int(autoencoder.config["latent_channels"])
    unet = UNet2DConditionModel(
        sample_size=images.size // 2 ** (len(autoencoder.config["block_out_channels"]) - 1),
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
    average = copy.deepcopy(unet).to(device).eval().requires_grad_(False)
    loop.prepare(unet)
    trained = TrainedUnCLIP(encoder, normalizer, autoencoder, average, noising, scheduler)
    draws = Draws(recipe.seed, "denoiser", ranks=loop.ranks)
    alphas = scheduler.alphas_cumprod.to(device)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = len(rows)
        noise_levels = draws.integers(0, config.max_noise_level + 1, batch)
        noise_levels[draws.uniform(batch) < CLEAN_PART] = 0
        chosen = embeddings[rows]
        condition = noise_embeddings(normalizer, noising, chosen, draws.normal(*chosen.shape), noise_levels)
        condition[draws.uniform(batch) < config.embedding_dropout] = 0
        times = draws.integers(0, len(alphas), batch).to(device)
        clean = latents[rows]
        noise = draws.normal(*clean.shape).to(device)
        a, b = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        predicted = unet(
            a * clean + b * noise, times, encoder_hidden_states=None, class_labels=condition.to(device)
        ).sample
        return F.mse_loss(predicted.float(), a * noise - b * clean)

    def publish(place: Path, network: nn.Module) -> StableUnCLIPConfig:
        assert save is not None
        return save(replace(trained, denoiser=network), place)

    rows = Batches(len(images), config.batch_size, draws)
    training = fit(
        "denoiser",
        unet,
        loss_of,
        rows,
        config.steps,
        config.lr,
        loop,
        images=images,
        average=average,
        publish=None if save is None else publish,
    )
    for step in training:
        average_into(average, unet, step, config.ema_decay)
    return trained
