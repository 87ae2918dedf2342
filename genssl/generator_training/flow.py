"""Trains a rectified flow on the features of a self-supervised encoder; no labels.

Time steps are drawn as t = sigmoid(n), n ~ N(0, 1) (logit-normal: Esser et al. 2024, arXiv 2403.03206, section 3.1).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from genssl.base.devices import seeded_initialisation
from genssl.base.safetensors_file import write_tensors
from genssl.config.generator_recipes.flow import FlowRecipe
from genssl.errors import GeneratorError, UserError
from genssl.generator_training.autoencoder import (
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
from genssl.generator_training.family import GeneratorTraining, channel_problems
from genssl.generator_training.loop import Loop, fit
from genssl.generator_training.rows import Draws, Images, Latents, Material
from genssl.generator_training.watching import Publish
from genssl.generators.conditioner import FILE
from genssl.generators.configs import FlowConfig
from genssl.generators.diffusion.loading import quiet_libraries
from genssl.generators.flow import CLASS, VAE, WEIGHTS, FlowParts, build_network, velocity
from genssl.generators.models import find_trained

TEACHER = "teacher"  # beside the model, while it is made: what a student of this recipe's own flow is measured with


class FlowTraining(GeneratorTraining[FlowRecipe]):
    """Trains the conditioner, then the flow on its features, then its student."""

    about = (
        "A rectified flow, conditioned on the features of a self-supervised encoder: `unet.safetensors` is the "
        "averaged network, `encoder.safetensors` the frozen encoder, `config.json` what rebuilds the network."
    )
    _autoencoder: AutoencoderKL | None = None  # given or trained
    _teacher: FlowParts | None = None  # given
    _facts: dict[str, Any]  # config.json of what is written

    def prepare(self) -> list[str]:
        """See the base class."""
        if self.recipe.autoencoder is not None:
            self._autoencoder = given_autoencoder(self.recipe.autoencoder)
        if self.recipe.distill is not None and self.recipe.distill.teacher is not None:
            self._teacher = given_teacher(self.recipe.distill.teacher)
            return self._problems_of_distilling(self._teacher)
        return self._problems()

    def _problems_of_distilling(self, teacher: FlowParts) -> list[str]:
        distill, size = self.recipe.distill, self.dataset.image_size
        assert distill is not None, "it names the teacher"
        problems = self.batch_problems(distill=distill.batch_size)
        if teacher.facts["image_size"] != size:
            problems.append(
                f"distill.teacher: {distill.teacher} makes images of {teacher.facts['image_size']} pixels; set "
                f"dataset.image_size to that (it is {size})"
            )
        return problems

    def _problems(self) -> list[str]:
        recipe, config, size = self.recipe, self.recipe.flow, self.dataset.image_size
        batches = {} if recipe.distill is None else {"distill": recipe.distill.batch_size}
        batches |= {"flow": config.batch_size} | conditioner_batches(recipe.conditioner)
        problems = [] if recipe.conditioner is None else conditioner_problems(recipe.conditioner)
        problems += self.batch_problems(**batches, **autoencoder_batches(recipe.autoencoder))
        if recipe.autoencoder is not None:
            problems += autoencoder_problems(recipe.autoencoder)
            factor = side_factor(recipe.autoencoder, self._autoencoder)
            if size % factor:
                problems.append(
                    f"autoencoder: images of {size} pixels do not divide into latents of 1/{factor} the side"
                )
            size //= factor
        problems += channel_problems("flow", config.block_out_channels)
        levels = len(config.block_out_channels)
        if size % 2 ** (levels - 1):
            of = "images" if recipe.autoencoder is None else "latents"
            problems.append(f"flow.block_out_channels: {levels} levels do not fit {of} of {size} pixels")
        if config.target == "neighbours" and config.neighbours > len(self.dataset):
            problems.append(
                f"flow.neighbours: {config.neighbours} is more than the {len(self.dataset)} training images"
            )
        return problems

    def train(self, images: Images) -> nn.Module:
        """See the base class."""
        recipe, loop, teacher = self.recipe, self.loop, self._teacher
        # --- what sees, and what makes latents ---
        if teacher is not None:
            teacher.to(loop.device)
            conditioner, self._autoencoder, self._facts = teacher.conditioner, teacher.autoencoder, teacher.facts
            if loop.ranks.first:
                shutil.copyfile(teacher.folder / FILE, self.folder / FILE)
        else:
            assert recipe.conditioner is not None, "the recipe has one of both"
            conditioner = make_conditioner(recipe.conditioner, images, recipe.seed, loop, self.folder)
            if recipe.autoencoder is not None:
                with seeded_initialisation(recipe.seed, "autoencoder"):
                    self._autoencoder = make_autoencoder(
                        recipe.autoencoder, self._autoencoder, images, recipe.seed, loop
                    )
            self._facts = self._config(images.size, conditioner.embedding_dim)
        latents = None if self._autoencoder is None else Latents(self._autoencoder, images)
        material = Material(images, embed_all(conditioner, images, loop.ranks), latents)
        # --- the flow, and its student ---
        network = train_flow(recipe, self._facts, material, loop, self.publish) if teacher is None else teacher.network
        if recipe.distill is None:
            return network
        if teacher is None and loop.ranks.first:  # the student is measured beside it
            place = self.folder.parent / TEACHER
            place.mkdir(exist_ok=True)
            self.publish(place, network)
        self._facts = self._facts | {
            "student_steps": recipe.distill.steps,
            "guidance_scale": recipe.distill.guidance_scale,
        }
        return distil(recipe, self._facts, network, material, loop, self.publish)

    def _config(self, image_size: int, embedding_dim: int) -> dict[str, Any]:
        """Returns the model's config.json."""
        config = self.recipe.flow
        facts: dict[str, Any] = {
            "_class_name": CLASS,
            "format": "genssl-flow/1",
            "image_size": image_size,
            "embedding_dim": embedding_dim,
            "max_embedding_noise": config.max_embedding_noise,
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
        }
        if self._autoencoder is not None:
            side = image_size // 2 ** (len(self._autoencoder.config["block_out_channels"]) - 1)
            facts["latents"] = {"channels": self._autoencoder.config["latent_channels"], "size": side}
        return facts

    def write(self, place: Path, network: nn.Module) -> FlowConfig:
        """See the base class."""
        write_tensors(place / WEIGHTS, network.state_dict())
        if self._autoencoder is not None:
            with quiet_libraries():
                self._autoencoder.save_pretrained(place / VAE, safe_serialization=True)
        (place / "config.json").write_text(json.dumps(self._facts, indent=2) + "\n")
        return FlowConfig(model=str(place))

    @classmethod
    def teacher(cls, recipe: FlowRecipe, partial: Path) -> FlowConfig | None:
        """Returns the flow that a student was distilled from, with the steps and the guidance that it learnt."""
        if (distill := recipe.distill) is None:
            return None
        return FlowConfig(
            model=distill.teacher or str(partial / TEACHER),
            num_inference_steps=distill.teacher_steps,
            guidance_scale=distill.guidance_scale,
        )


def given_teacher(model: str) -> FlowParts:
    """Returns the flow that `distill.teacher` names, on the CPU; refuses one that is a student itself."""
    try:
        parts = FlowParts.load(find_trained(model, CLASS))
    except GeneratorError as error:
        raise UserError(f"distill.teacher: {str(error).removeprefix('generator.model: ')}") from None
    if "student_steps" in parts.facts:
        raise UserError(
            f"distill.teacher: {model} is a student of {parts.facts['student_steps']} steps; give its teacher"
        )
    return parts


def train_flow(
    recipe: FlowRecipe, facts: dict[str, Any], material: Material, loop: Loop, publish: Publish
) -> nn.Module:
    """Trains the velocity network that `facts`, the model's config.json, describe; returns its averaged weights."""
    config, embeddings, device = recipe.flow, material.embeddings, loop.device
    with seeded_initialisation(recipe.seed, "flow"):
        network = build_network(facts)
    average: nn.Module = loop.averaged(network)
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

    fit(
        "flow",
        network,
        loss_of,
        config,
        draws,
        loop,
        count=len(embeddings),
        steps=config.steps,
        images=material.images if config.target == "self" else None,
        average=average,
        ema_decay=config.ema_decay,
        publish=publish,
    )
    return average
