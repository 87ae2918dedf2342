"""Trains a small Stable unCLIP from images alone: image encoder by SimCLR, KL autoencoder, denoiser; no labels.

The result is an ordinary diffusers folder: `StableUnCLIPImg2ImgPipeline.from_pretrained` loads it, and so does
`generator: {name: stable_unclip, model: DIR}`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from genssl.config.unclip_recipe import StableUnCLIPRecipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.generators.stable_unclip import noise_embeddings
from genssl.methods.losses import nt_xent
from genssl.runtime import seeded_initialisation, stream
from genssl.training.fitting import Batches, Checkpoints, Report, average_into, fit, load_images
from genssl.views.augment import Augment

# The text path of the pipeline exists but says nothing: one constant, empty prompt.
TEXT_WIDTH = 8
NORM_GROUPS = 8


@dataclass
class TrainedUnCLIP:
    """The trained parts of the pipeline."""

    image_encoder: CLIPVisionModelWithProjection
    normalizer: StableUnCLIPImageNormalizer
    autoencoder: AutoencoderKL
    denoiser: UNet2DConditionModel
    noising: DDPMScheduler
    scheduler: DDIMScheduler


def train_unclip(
    recipe: StableUnCLIPRecipe, dataset: ImageDataset, device: torch.device, report: Report, checkpoints: Checkpoints
) -> TrainedUnCLIP:
    """Trains the three networks one after the other.

    Args:
        recipe: sizes and lengths.
        dataset: the train split; only its images are used.
        device: where to train.
        report: called now and then with the progress.
        checkpoints: where the states of the stages are kept.

    Raises:
        ConfigError: if sizes do not fit each other or the data set.
    """
    _check_sizes(recipe, dataset)
    images = load_images(dataset, device)
    with seeded_initialisation(recipe.seed, "unclip"):
        encoder = train_image_encoder(recipe, images, report, checkpoints)
        autoencoder = train_autoencoder(recipe, images, report, checkpoints)
        return train_denoiser(recipe, images, encoder, autoencoder, report, checkpoints)


def _check_sizes(recipe: StableUnCLIPRecipe, dataset: ImageDataset) -> None:
    size, factor = dataset.image_size, 2 ** (len(recipe.autoencoder.block_out_channels) - 1)
    problems = []
    if size % 8:
        problems.append(f"dataset.image_size: {size} is not a multiple of 8, which the diffusers pipeline asks for")
    if size % recipe.image_encoder.patch_size:
        problems.append(
            f"image_encoder.patch_size: {recipe.image_encoder.patch_size} does not divide the image size {size}"
        )
    if recipe.image_encoder.hidden_size % recipe.image_encoder.num_heads:
        problems.append(
            f"image_encoder.hidden_size: {recipe.image_encoder.hidden_size} is not a multiple of num_heads, "
            f"{recipe.image_encoder.num_heads}"
        )
    for section, channels in (
        ("autoencoder", recipe.autoencoder.block_out_channels),
        ("denoiser", recipe.denoiser.block_out_channels),
    ):
        if any(count % NORM_GROUPS for count in channels):
            problems.append(f"{section}.block_out_channels: {channels} are not all multiples of {NORM_GROUPS}")
    levels = len(recipe.denoiser.block_out_channels)
    if size % (factor * 2 ** (levels - 1)):
        problems.append(f"denoiser.block_out_channels: {levels} levels do not fit latents of {size // factor} pixels")
    for section, batch in (
        ("image_encoder", recipe.image_encoder.batch_size),
        ("autoencoder", recipe.autoencoder.batch_size),
        ("denoiser", recipe.denoiser.batch_size),
    ):
        if batch > len(dataset):
            problems.append(f"{section}.batch_size: {batch} is more than the {len(dataset)} training images")
    if problems:
        raise ConfigError(problems)


def train_image_encoder(
    recipe: StableUnCLIPRecipe, images: torch.Tensor, report: Report, checkpoints: Checkpoints
) -> CLIPVisionModelWithProjection:
    """Trains a CLIP vision transformer by SimCLR; the projected embedding is what NT-Xent sees, through a small head.

    Args:
        images: uint8 [N, 3, S, S] on the training device.
    """
    config = recipe.image_encoder
    size = images.shape[-1]
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            projection_dim=config.embedding_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=size,
            patch_size=config.patch_size,
            hidden_act="gelu",
        )
    ).to(images.device)
    head = nn.Sequential(nn.Linear(config.embedding_dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)).to(
        images.device
    )
    both = nn.ModuleList([encoder, head])
    augment, draws = Augment(config.augmentation, size), stream(recipe.seed, "image encoder")

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = images[rows.to(images.device)].float() / 255
        first, second = (head(encoder(2 * augment(batch, draws) - 1).image_embeds) for _ in range(2))
        return nt_xent(first, second, config.temperature)

    steps = config.epochs * (len(images) // config.batch_size)
    rows = Batches(len(images), config.batch_size, draws)
    for _ in fit("image encoder", both, loss_of, rows, steps, config.lr, report, checkpoints=checkpoints):
        pass
    return encoder.eval().requires_grad_(False)


def train_autoencoder(
    recipe: StableUnCLIPRecipe, images: torch.Tensor, report: Report, checkpoints: Checkpoints
) -> AutoencoderKL:
    """Trains a KL autoencoder by squared error, and sets its scaling factor to 1 / std of the latents."""
    config = recipe.autoencoder
    levels = len(config.block_out_channels)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=NORM_GROUPS,
        sample_size=images.shape[-1],
        mid_block_add_attention=False,
    ).to(images.device)
    draws = stream(recipe.seed, "autoencoder")

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = images[rows.to(images.device)].float() / 127.5 - 1
        latents = autoencoder.encode(batch).latent_dist
        noise = torch.randn(latents.mean.shape, generator=draws).to(batch)
        reconstruction = autoencoder.decode(latents.mean + latents.std * noise).sample
        divergence: torch.Tensor = latents.kl().mean()
        return F.mse_loss(reconstruction, batch) + config.kl_weight * divergence

    steps = config.epochs * (len(images) // config.batch_size)
    rows = Batches(len(images), config.batch_size, draws)
    for _ in fit("autoencoder", autoencoder, loss_of, rows, steps, config.lr, report, checkpoints=checkpoints):
        pass
    autoencoder.register_to_config(scaling_factor=1 / float(_latents(autoencoder, images).std()))
    return autoencoder


@torch.inference_mode()
def _latents(autoencoder: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    parts = [autoencoder.encode(part.float() / 127.5 - 1).latent_dist.mean for part in torch.split(images, 512)]
    latents: torch.Tensor = torch.cat(parts).clone()
    return latents


def train_denoiser(
    recipe: StableUnCLIPRecipe,
    images: torch.Tensor,
    encoder: CLIPVisionModelWithProjection,
    autoencoder: AutoencoderKL,
    report: Report,
    checkpoints: Checkpoints,
) -> TrainedUnCLIP:
    """Trains the UNet to predict v on latents, given the image's noised embedding; returns averaged weights."""
    config, device = recipe.denoiser, images.device
    with torch.inference_mode():
        pixels = [2 * part.float() / 255 - 1 for part in torch.split(images, 512)]
        embeddings = torch.cat([encoder(part).image_embeds for part in pixels]).cpu().clone()
    latents = _latents(autoencoder, images) * autoencoder.config["scaling_factor"]

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
    levels = len(config.block_out_channels)
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        in_channels=latents.shape[1],
        out_channels=latents.shape[1],
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
    ).to(device)
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    draws = stream(recipe.seed, "denoiser")
    alphas = scheduler.alphas_cumprod.to(device)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = len(rows)
        noise_levels = torch.randint(0, config.max_noise_level + 1, (batch,), generator=draws)
        # A third of the rows sees nearly clean embeddings, the noise level that most users ask for.
        noise_levels[torch.rand(batch, generator=draws) < 1 / 3] = 0
        chosen = embeddings[rows]
        condition = noise_embeddings(
            normalizer, noising, chosen, torch.randn(chosen.shape, generator=draws), noise_levels
        )
        condition[torch.rand(batch, generator=draws) < config.embedding_dropout] = 0
        times = torch.randint(0, len(alphas), (batch,), generator=draws).to(device)
        clean = latents[rows.to(device)]
        noise = torch.randn(clean.shape, generator=draws).to(device)
        a, b = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
        predicted = unet(
            a * clean + b * noise, times, encoder_hidden_states=None, class_labels=condition.to(device)
        ).sample
        return F.mse_loss(predicted, a * noise - b * clean)

    rows = Batches(len(images), config.batch_size, draws)
    training = fit(
        "denoiser", unet, loss_of, rows, config.steps, config.lr, report, checkpoints=checkpoints, average=average
    )
    for step in training:
        decay = min(config.ema_decay, (step + 1) / (step + 10))
        average_into(average, unet, decay)
    return TrainedUnCLIP(encoder, normalizer, autoencoder, average, noising, scheduler)
