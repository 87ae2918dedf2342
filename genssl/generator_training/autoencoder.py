"""The autoencoder of a latent generator: one that is given, or one that is trained on the images; and their latents."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from genssl.config.generator_recipes.sections import AutoencoderConfig
from genssl.errors import GeneratorError, UserError
from genssl.generator_training.family import NORM_GROUPS
from genssl.generator_training.loop import Loop, fit
from genssl.generator_training.rows import Draws, Images, mean_latents
from genssl.generators.diffusion.loading import load_network
from genssl.generators.models import find_network

MEASURED_ON = 5000  # images, for the spread of the latents


def autoencoder_problems(config: AutoencoderConfig) -> list[str]:
    """Returns what cannot work, as lines "key: problem"; batches apart."""
    if config.model is None and any(count % NORM_GROUPS for count in config.block_out_channels):
        return [f"autoencoder.block_out_channels: {config.block_out_channels} are not all multiples of {NORM_GROUPS}"]
    return []


def autoencoder_batches(config: AutoencoderConfig | None) -> dict[str, int]:
    """Returns the batch size of the autoencoder's training, if there is one, as `batch_problems` takes it."""
    return {} if config is None or config.model is not None else {"autoencoder": config.batch_size}


def given_autoencoder(config: AutoencoderConfig) -> AutoencoderKL | None:
    """Returns the autoencoder that the section names, on the CPU; None if one is to be trained.

    Raises:
        UserError: if it cannot be had, or its latents are not scaled by one number alone.
    """
    if config.model is None:
        return None
    key = "autoencoder.model"
    try:
        folder = find_network(config.model, "AutoencoderKL", key)
        network: AutoencoderKL = load_network(AutoencoderKL, folder, "", torch.float32, torch.device("cpu"))
    except GeneratorError as error:
        raise UserError(str(error) if str(error).startswith(key) else f"{key}: {error}") from None
    if network.config["shift_factor"] is not None:
        raise UserError(
            f"{key}: {config.model} shifts its latents (shift_factor {network.config['shift_factor']}), as those of "
            "Stable Diffusion 3 and FLUX do; give one that only scales them, as those of Stable Diffusion 1, 2 and XL"
        )
    return network


def side_factor(config: AutoencoderConfig, given: AutoencoderKL | None) -> int:
    """Returns how many pixels of an image's side a latent's side has one of."""
    channels = config.block_out_channels if given is None else given.config["block_out_channels"]
    return int(2 ** (len(channels) - 1))


def make_autoencoder(
    config: AutoencoderConfig, given: AutoencoderKL | None, images: Images, seed: int, loop: Loop
) -> AutoencoderKL:
    """Returns the given autoencoder, or trains one, whose scaling factor then is 1 / std of the latents.

    Its loss is the squared error and `kl_weight` of the divergence. First weights come from torch's default stream,
    which the caller seeds.
    """
    if given is not None:
        frozen: AutoencoderKL = given.to(loop.device)
        return frozen
    levels = len(config.block_out_channels)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=NORM_GROUPS,
        sample_size=images.size,
        mid_block_add_attention=False,
    )
    draws = Draws(seed, "autoencoder", ranks=loop.ranks)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = images[rows].float() / 127.5 - 1
        latents = autoencoder.encode(batch).latent_dist
        noise = draws.normal(*latents.mean.shape).to(batch)
        reconstruction = autoencoder.decode(latents.mean + latents.std * noise).sample
        divergence: torch.Tensor = latents.kl().mean()
        return F.mse_loss(reconstruction.float(), batch) + config.kl_weight * divergence

    fit(
        "autoencoder", autoencoder, loss_of, config, draws, loop, count=len(images), epochs=config.epochs, images=images
    )
    with torch.inference_mode():
        measured = [mean_latents(autoencoder, part) for part in images.parts(range(min(len(images), MEASURED_ON)))]
    autoencoder.register_to_config(scaling_factor=1 / float(torch.cat(measured).std()))
    return autoencoder
