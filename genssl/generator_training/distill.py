"""Distils a flow into a student of few Euler steps, often one; no labels.

With K steps the student's velocity at k / K is what leads, in one step, to where its teacher is at (k + 1) / K: it is
still a flow with Euler steps, of which it knows K.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genssl.base.devices import seeded_initialisation
from genssl.config.generator_recipes.flow import DistillationConfig, FlowRecipe
from genssl.generator_training.loop import Loop, fit
from genssl.generator_training.rows import Draws, Material
from genssl.generator_training.watching import Publish
from genssl.generators.diffusion.sampling import guide
from genssl.generators.flow import build_network, latent_shape, velocity


def distil(
    recipe: FlowRecipe,
    facts: dict[str, Any],
    teacher: nn.Module,
    material: Material,
    loop: Loop,
    publish: Publish,
) -> nn.Module:
    """Trains a student of `recipe.distill.steps` steps and returns its averaged weights.

    Objectives:
        trajectory: from noise, the teacher goes all its steps; the student's velocity at every k / K is regressed on
            the mean of the teacher's over the part that follows (Luhman & Luhman 2021, arXiv 2101.02388; the
            distillation of Liu et al. 2022, arXiv 2209.03003, section 2.3).
        consistency: from a noised image the teacher goes one step, from where the student's average goes on to the end
            of the part; the student is to arrive there from the noised image (Song et al. 2023, arXiv 2303.01469,
            algorithm 2; in parts as in Heek et al. 2024, arXiv 2403.06807).

    The teacher is the velocity network alone; `facts` are the config.json of the student.
    """
    config, device = recipe.distill, loop.device
    assert config is not None, "the recipe has it"
    teacher.to(device).eval().requires_grad_(False)
    with seeded_initialisation(recipe.seed, "distill"):  # overwritten by the teacher's weights
        network: nn.Module = build_network(facts)
    network.load_state_dict(teacher.state_dict())
    average = loop.averaged(network)
    draws = Draws(recipe.seed, "distill", ranks=loop.ranks)
    max_noise = float(facts["max_embedding_noise"])
    needs_images = config.objective == "consistency"
    goal = _Trajectory(config, teacher) if config.objective == "trajectory" else _Consistency(config, teacher, average)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        condition = material.condition(rows, max_noise, draws).to(device)
        noise = draws.normal(len(rows), *latent_shape(facts)).to(device)
        clean = material.clean(rows) if needs_images else noise  # a trajectory starts from noise and never reads it
        return goal.loss(network, noise, clean, condition, draws)

    fit(
        "distill",
        network,
        loss_of,
        config,
        draws,
        loop,
        count=len(material.embeddings),
        steps=config.training_steps,
        images=material.images if needs_images else None,
        average=average,
        ema_decay=config.ema_decay,
        publish=publish,
    )
    return average


class _Teacher:
    """Goes Euler steps of the teacher, with its guidance."""

    def __init__(self, config: DistillationConfig, network: nn.Module) -> None:
        self.steps, self.parts = config.teacher_steps, config.steps
        self._network, self._guidance = network, config.guidance_scale

    @torch.no_grad()
    def step(self, x: torch.Tensor, number: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Returns x [B, C, h, w] one step further than step `number` [B], 0..steps - 1."""
        times = number.to(x) / self.steps
        if self._guidance <= 1:
            return x + velocity(self._network, x, times, condition).float() / self.steps
        both = velocity(
            self._network,
            torch.cat([x, x]),
            torch.cat([times, times]),
            torch.cat([torch.zeros_like(condition), condition]),
        )
        scale = torch.full((len(x), 1, 1, 1), self._guidance, device=x.device)
        return x + guide(both.float(), scale) / self.steps


class _Trajectory(_Teacher):
    def loss(
        self, student: nn.Module, noise: torch.Tensor, clean: torch.Tensor, condition: torch.Tensor, draws: Draws
    ) -> torch.Tensor:
        x, at = noise, [noise]
        for number in range(self.steps):
            x = self.step(x, torch.full((len(x),), number, device=x.device), condition)
            if (number + 1) % (self.steps // self.parts) == 0:
                at.append(x)
        starts, ends = torch.cat(at[:-1]), torch.cat(at[1:])
        times = torch.arange(self.parts, device=x.device).repeat_interleave(len(noise)) / self.parts
        predicted = velocity(student, starts, times, condition.repeat(self.parts, 1)).float()
        return F.mse_loss(predicted / self.parts, ends - starts)


class _Consistency(_Teacher):
    def __init__(self, config: DistillationConfig, network: nn.Module, average: nn.Module) -> None:
        super().__init__(config, network)
        self._average = average

    def loss(
        self, student: nn.Module, noise: torch.Tensor, clean: torch.Tensor, condition: torch.Tensor, draws: Draws
    ) -> torch.Tensor:
        number = draws.integers(0, self.steps, len(noise)).to(noise.device)
        t = _column(number / self.steps)
        x = (1 - t) * noise + t * clean
        end = _column((number * self.parts // self.steps + 1) / self.parts)
        with torch.no_grad():
            further, later = self.step(x, number, condition), (number + 1) / self.steps
            rest = velocity(self._average, further, later, condition).float()
            arrived = further + (end - _column(later)) * rest
        predicted = x + (end - t) * velocity(student, x, number / self.steps, condition).float()
        return F.mse_loss(predicted, arrived)


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)
