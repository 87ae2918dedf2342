"""Trains a rectified flow on the features of a self-supervised encoder; no labels.

Time steps are drawn as t = sigmoid(n), n ~ N(0, 1) (logit-normal: Esser et al. 2024, arXiv 2403.03206, section 3.1).
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel

from genssl.base.devices import seeded_initialisation
from genssl.base.ranks import Ranks
from genssl.base.safetensors_file import write_tensors
from genssl.config.generator_recipes.flow import FlowRecipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError, GeneratorError, UserError
from genssl.generator_training.autoencoder import (
    Latents,
    autoencoder_batches,
    autoencoder_problems,
    given_autoencoder,
    make_autoencoder,
    side_factor,
)
from genssl.generator_training.conditioner import (
    conditioner_batches,
    conditioner_problems,
    embed_all,
    make_conditioner,
    nearest_neighbours,
)
from genssl.generator_training.distill import distil
from genssl.generator_training.flow_material import Material
from genssl.generator_training.loop import Loop, average_into, batch_problems, channel_problems, fit
from genssl.generator_training.rows import Batches, Draws, Images
from genssl.generator_training.watching import Publish
from genssl.generators.conditioner import FILE
from genssl.generators.configs import FlowConfig
from genssl.generators.diffusion.loading import quiet_libraries
from genssl.generators.flow import (
    CLASS,
    VAE,
    WEIGHTS,
    FlowParts,
    build_network,
    velocity,
)
from genssl.generators.models import find_trained

TEACHER = "teacher"  # beside the model, while it is made: what a student of this recipe's own flow is measured with


def train_and_save(recipe: FlowRecipe, train: ImageDataset, loop: Loop, folder: Path) -> FlowConfig:
    """Trains the conditioner, then the flow on its features, then its student; see `Family.trainer`.

    Raises:
        ConfigError: if sizes do not fit each other or the data set; before anything is trained.
        UserError: if an encoder, autoencoder or teacher cannot be read, or a loss is not finite.
    """
    given = None if recipe.autoencoder is None else given_autoencoder(recipe.autoencoder)
    teacher = None if recipe.distill is None else given_teacher(recipe.distill.teacher)
    check_sizes(recipe, train, loop.ranks, given, teacher)
    images = Images(train, loop.device)
    if teacher is not None:
        teacher.to(loop.device)
        conditioner, autoencoder, facts = teacher.conditioner, teacher.autoencoder, teacher.facts
        if loop.ranks.first:
            shutil.copyfile(teacher.folder / FILE, folder / FILE)
    else:
        assert recipe.conditioner is not None, "the recipe has one of both"
        conditioner = make_conditioner(recipe.conditioner, images, recipe.seed, loop, folder)
        autoencoder = None
        if recipe.autoencoder is not None:
            with seeded_initialisation(recipe.seed, "autoencoder"):
                autoencoder = make_autoencoder(recipe.autoencoder, given, images, recipe.seed, loop)
        facts = _facts(recipe, images.size, conditioner.embedding_dim, autoencoder)
    material = Material(
        images,
        embed_all(conditioner, images, loop.ranks),
        None if autoencoder is None else Latents(autoencoder, images),
    )

    def publish(place: Path, network: torch.nn.Module) -> FlowConfig:
        if place != folder:
            shutil.copyfile(folder / FILE, place / FILE)
        return _write(place, facts, network, autoencoder)

    network = train_flow(recipe, facts, material, loop, publish) if teacher is None else teacher.network
    if recipe.distill is not None:
        if teacher is None and loop.ranks.first:  # the student is measured beside it
            place = folder.parent / TEACHER
            place.mkdir(exist_ok=True)
            publish(place, network)
        facts = facts | {"student_steps": recipe.distill.steps, "guidance_scale": recipe.distill.guidance_scale}
        network = distil(recipe, facts, network, material, loop, publish)
    return publish(folder, network) if loop.ranks.first else FlowConfig(model=str(folder))


def _facts(
    recipe: FlowRecipe, image_size: int, embedding_dim: int, autoencoder: AutoencoderKL | None
) -> dict[str, Any]:
    """Returns the model's config.json."""
    facts: dict[str, Any] = {
        "_class_name": CLASS,
        "format": "genssl-flow/1",
        "image_size": image_size,
        "embedding_dim": embedding_dim,
        "max_embedding_noise": recipe.flow.max_embedding_noise,
        "block_out_channels": recipe.flow.block_out_channels,
        "layers_per_block": recipe.flow.layers_per_block,
    }
    if autoencoder is not None:
        side = image_size // 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
        facts["latents"] = {"channels": autoencoder.config["latent_channels"], "size": side}
    return facts


def _write(
    folder: Path, facts: dict[str, Any], network: torch.nn.Module, autoencoder: AutoencoderKL | None
) -> FlowConfig:
    """Writes all of a flow but its encoder into an existing folder."""
    write_tensors(folder / WEIGHTS, network.state_dict())
    if autoencoder is not None:
        with quiet_libraries():
            autoencoder.save_pretrained(folder / VAE, safe_serialization=True)
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return FlowConfig(model=str(folder))


def given_teacher(model: str | None) -> FlowParts | None:
    """Returns the flow that `distill.teacher` names, on the CPU; None if it is the one that the recipe trains.

    Raises:
        UserError: if it cannot be read, or is a student itself.
    """
    if model is None:
        return None
    try:
        parts = FlowParts.load(find_trained(model, CLASS))
    except GeneratorError as error:
        raise UserError(f"distill.teacher: {str(error).removeprefix('generator.model: ')}") from None
    if "student_steps" in parts.facts:
        raise UserError(
            f"distill.teacher: {model} is a student of {parts.facts['student_steps']} steps; give its teacher"
        )
    return parts


def check_sizes(
    recipe: FlowRecipe, dataset: ImageDataset, ranks: Ranks, given: AutoencoderKL | None, teacher: FlowParts | None
) -> None:
    """Raises ConfigError with every size that does not fit, one line each."""
    config, size = recipe.flow, dataset.image_size
    batches = {} if recipe.distill is None else {"distill": recipe.distill.batch_size}
    if teacher is not None:
        problems = batch_problems(recipe, len(dataset), ranks, **batches)
        if teacher.facts["image_size"] != size:
            problems.append(
                f"distill.teacher: {recipe.distill and recipe.distill.teacher} makes images of "
                f"{teacher.facts['image_size']} pixels; set dataset.image_size to that (it is {size})"
            )
        if problems:
            raise ConfigError(problems)
        return
    batches |= {"flow": config.batch_size} | conditioner_batches(recipe.conditioner)
    problems = [] if recipe.conditioner is None else conditioner_problems(recipe.conditioner)
    problems += batch_problems(recipe, len(dataset), ranks, **batches, **autoencoder_batches(recipe.autoencoder))
    if recipe.autoencoder is not None:
        problems += autoencoder_problems(recipe.autoencoder)
        factor = side_factor(recipe.autoencoder, given)
        if size % factor:
            problems.append(f"autoencoder: images of {size} pixels do not divide into latents of 1/{factor} the side")
        size //= factor
    problems += channel_problems("flow", config.block_out_channels)
    levels = len(config.block_out_channels)
    if size % 2 ** (levels - 1):
        of = "images" if recipe.autoencoder is None else "latents"
        problems.append(f"flow.block_out_channels: {levels} levels do not fit {of} of {size} pixels")
    if config.target == "neighbours" and config.neighbours > len(dataset):
        problems.append(f"flow.neighbours: {config.neighbours} is more than the {len(dataset)} training images")
    if problems:
        raise ConfigError(problems)


def train_flow(
    recipe: FlowRecipe, facts: dict[str, Any], material: Material, loop: Loop, publish: Publish | None = None
) -> UNet2DConditionModel:
    """Trains the velocity network and returns its averaged weights.

    Args:
        recipe: target and lengths.
        facts: the model's config.json.
        material: images or latents, and embeddings.
        loop: device, precision, ranks, checkpoints.
        publish: writes the averaged network as a generator, for `loop.watch`.
    """
    config, embeddings, device = recipe.flow, material.embeddings, loop.device
    with seeded_initialisation(recipe.seed, "flow"):
        network = build_network(facts)
    average = copy.deepcopy(network).to(device).eval().requires_grad_(False)
    loop.prepare(network)
    draws = Draws(recipe.seed, "flow", ranks=loop.ranks)
    targets = torch.arange(len(embeddings)).view(-1, 1)
    if config.target == "neighbours" and config.neighbours > 1:
        targets = torch.cat([targets, nearest_neighbours(embeddings, config.neighbours - 1, device)], dim=1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = len(rows)
        condition = material.condition(rows, config.max_embedding_noise, draws)
        condition[draws.uniform(batch) < config.embedding_dropout] = 0
        choice = draws.integers(0, targets.shape[1], batch)
        clean = material.clean(targets[rows, choice])
        noise = draws.normal(*clean.shape).to(device)
        times = draws.normal(batch).sigmoid().to(device)
        t = times.view(-1, 1, 1, 1)
        predicted = velocity(network, (1 - t) * noise + t * clean, times, condition.to(device))
        return F.mse_loss(predicted.float(), clean - noise)

    rows = Batches(len(embeddings), config.batch_size, draws)
    ahead = material.images if config.target == "self" else None
    training = fit(
        "flow", network, loss_of, rows, config.steps, config.lr, loop, images=ahead, average=average, publish=publish
    )
    for step in training:
        average_into(average, network, step, config.ema_decay)
    return average
