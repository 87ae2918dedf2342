"""Trains a rectified flow on the features of a self-supervised encoder; no labels.

Time steps are drawn as t = sigmoid(n), n ~ N(0, 1) (logit-normal: Esser et al. 2024, arXiv 2403.03206, section 3.1).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import save

from genssl.config.flow_recipe import FlowRecipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.generators.configs import FlowConfig
from genssl.generators.flow import CLASS, NORM_GROUPS, WEIGHTS, build_network, noise_embeddings, velocity
from genssl.runtime import seeded_initialisation, stream
from genssl.training.conditioner import conditioner_problems, embed_all, make_conditioner, nearest_neighbours
from genssl.training.fitting import Batches, Checkpoints, Report, average_into, fit, load_images

CLEAN_PART = 1 / 3  # of the rows sees embeddings without noise, which most users ask for


def train_and_save(
    recipe: FlowRecipe, train: ImageDataset, device: torch.device, report: Report, folder: Path
) -> FlowConfig:
    """Trains the conditioner, then the flow on its features; see `Family.trainer`.

    Raises:
        ConfigError: if sizes do not fit each other or the data set; before anything is trained.
        UserError: if a run's encoder cannot be read, or a loss is not finite.
    """
    check_sizes(recipe, train)
    images = load_images(train, device)
    checkpoints = Checkpoints(folder)
    conditioner = make_conditioner(recipe.conditioner, images, recipe.seed, report, folder)
    facts = {
        "_class_name": CLASS,
        "format": "genssl-flow/1",
        "image_size": train.image_size,
        "embedding_dim": conditioner.embedding_dim,
        "max_embedding_noise": recipe.flow.max_embedding_noise,
        "block_out_channels": recipe.flow.block_out_channels,
        "layers_per_block": recipe.flow.layers_per_block,
    }
    network = train_flow(recipe, facts, images, embed_all(conditioner, images), report, checkpoints)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(tensors))
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return FlowConfig(model=str(folder))


def check_sizes(recipe: FlowRecipe, dataset: ImageDataset) -> None:
    """Raises ConfigError with every size that does not fit, one line each."""
    config, size = recipe.flow, dataset.image_size
    problems = conditioner_problems(recipe.conditioner, len(dataset))
    if any(count % NORM_GROUPS for count in config.block_out_channels):
        problems.append(f"flow.block_out_channels: {config.block_out_channels} are not all multiples of {NORM_GROUPS}")
    levels = len(config.block_out_channels)
    if size % 2 ** (levels - 1):
        problems.append(f"flow.block_out_channels: {levels} levels do not fit images of {size} pixels")
    if config.batch_size > len(dataset):
        problems.append(f"flow.batch_size: {config.batch_size} is more than the {len(dataset)} training images")
    if config.target == "neighbours" and config.neighbours > len(dataset):
        problems.append(f"flow.neighbours: {config.neighbours} is more than the {len(dataset)} training images")
    if problems:
        raise ConfigError(problems)


def train_flow(
    recipe: FlowRecipe,
    facts: dict[str, Any],
    images: torch.Tensor,
    embeddings: torch.Tensor,
    report: Report,
    checkpoints: Checkpoints,
) -> UNet2DConditionModel:
    """Trains the velocity network and returns its averaged weights.

    Args:
        recipe: target and lengths.
        facts: the model's config.json.
        images: uint8 [N, 3, S, S] on the training device.
        embeddings: float32 [N, D] on the CPU, as `Conditioner.embed` gives them.
        report: called with the progress.
        checkpoints: where the state is kept.
    """
    config, device = recipe.flow, images.device
    with seeded_initialisation(recipe.seed, "flow"):
        network = build_network(facts).to(device)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    draws = stream(recipe.seed, "flow")
    targets = torch.arange(len(images)).view(-1, 1)
    if config.target == "neighbours" and config.neighbours > 1:
        targets = torch.cat([targets, nearest_neighbours(embeddings, config.neighbours - 1)], dim=1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = len(rows)
        levels = config.max_embedding_noise * torch.rand(batch, generator=draws)
        levels[torch.rand(batch, generator=draws) < CLEAN_PART] = 0
        chosen = embeddings[rows]
        condition = noise_embeddings(chosen, torch.randn(chosen.shape, generator=draws), levels)
        condition[torch.rand(batch, generator=draws) < config.embedding_dropout] = 0
        choice = torch.randint(targets.shape[1], (batch,), generator=draws)
        clean = images[targets[rows, choice].to(device)].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=draws).to(device)
        times = torch.randn(batch, generator=draws).sigmoid().to(device)
        t = times.view(-1, 1, 1, 1)
        return F.mse_loss(velocity(network, (1 - t) * noise + t * clean, times, condition.to(device)), clean - noise)

    rows = Batches(len(images), config.batch_size, draws)
    training = fit(
        "flow", network, loss_of, rows, config.steps, config.lr, report, checkpoints=checkpoints, average=average
    )
    for step in training:
        average_into(average, network, min(config.ema_decay, (step + 1) / (step + 10)))
    return average
