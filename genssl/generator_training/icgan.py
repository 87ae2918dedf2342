"""Trains an instance-conditioned GAN (Casanova et al. 2021, arXiv 2109.05070); no labels.

The discriminator sees a feature with a real neighbour of its instance, or with an image made of the feature. Deviations
from the paper, made for small models and short trainings: features have length sqrt(D) (see `Conditioner.embed`), no
spectral norm in the generator, one learning rate that decays to 0, and batch-norm statistics measured afterwards.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from genssl.base.batch_norm import synchronise_batch_norm
from genssl.base.devices import seeded_initialisation
from genssl.base.safetensors_file import write_tensors
from genssl.config.generator_recipes.icgan import ICGANRecipe
from genssl.generator_training.conditioner import (
    conditioner_batches,
    conditioner_problems,
    embed_all,
    make_conditioner,
    nearest_neighbours,
)
from genssl.generator_training.family import GeneratorTraining
from genssl.generator_training.loop import average_into
from genssl.generator_training.rows import Draws, Images
from genssl.generators.configs import GeneratorConfig, ICGANConfig
from genssl.generators.icgan.generator import CLASS, FORMAT, WEIGHTS
from genssl.generators.icgan.networks import Architecture, GeneratorNetwork

STAGE = "icgan"
STATISTICS_BATCH = 256
STATISTICS_PASSES = 8


class ICGANTraining(GeneratorTraining[ICGANRecipe]):
    """Trains the conditioner, then generator and discriminator on its features."""

    about = (
        "An instance-conditioned GAN: a generator of one forward pass, conditioned on the features of a "
        "self-supervised encoder."
    )

    def prepare(self) -> list[str]:
        """See the base class."""
        recipe, generator, size = self.recipe, self.recipe.generator, self.dataset.image_size
        blocks = len(generator.channels) - 1
        problems = conditioner_problems(recipe.conditioner)
        problems += self.batch_problems(
            adversarial=recipe.adversarial.batch_size, **conditioner_batches(recipe.conditioner)
        )
        if (made := generator.bottom * 2**blocks) != size:
            problems.append(
                f"generator.channels: {blocks} blocks make {made} px of {generator.bottom}; the images have {size}"
            )
        for block in generator.attention:
            if block >= blocks:
                problems.append(f"generator.attention: there is no block {block}; the last one is {blocks - 1}")
            elif generator.channels[block + 1] % 8:
                problems.append(f"generator.attention: the channels of block {block} are not a multiple of 8")
        halvings = len(recipe.discriminator.channels)
        if size % 2**halvings:
            problems.append(f"discriminator.channels: {halvings} blocks cannot halve {size} px that often")
        if recipe.adversarial.neighbours >= len(self.dataset):
            problems.append(f"adversarial.neighbours: must be fewer than the {len(self.dataset)} training images")
        return problems

    def train(self, images: Images) -> GeneratorNetwork:
        """See the base class."""
        conditioner = make_conditioner(self.recipe.conditioner, images, self.recipe.seed, self.loop, self.folder)
        return self.train_networks(images, embed_all(conditioner, images, self.loop.ranks))

    def train_networks(self, images: Images, features: torch.Tensor) -> GeneratorNetwork:
        """Trains both networks on images and their features, float32 [N, D] on the CPU.

        Returns the generator's averaged weights with measured batch-norm statistics.
        """
        recipe, config, loop = self.recipe, self.recipe.adversarial, self.loop
        # --- networks ---
        architecture = Architecture(
            feature_dim=int(features.shape[1]),
            feature_width=recipe.generator.feature_width,
            noise_chunk=recipe.generator.noise_chunk,
            bottom=recipe.generator.bottom,
            channels=tuple(recipe.generator.channels),
            attention=tuple(recipe.generator.attention),
        )
        with seeded_initialisation(recipe.seed, "icgan"):
            generator = GeneratorNetwork(architecture)
            for module in generator.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.orthogonal_(module.weight)
            discriminator = Discriminator(recipe.discriminator.channels, architecture.feature_dim)
        average = loop.averaged(generator)
        loop.prepare(generator)
        loop.prepare(discriminator)
        generator_optimizer, discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), lr=lr, betas=(0.0, 0.999), eps=1e-6)
            for network, lr in ((generator, config.lr_generator), (discriminator, config.lr_discriminator))
        )
        # --- data and losses ---
        draws = Draws(recipe.seed, "icgan", ranks=loop.ranks)
        neighbours = nearest_neighbours(features, config.neighbours, loop.device)
        pairs = _Pairs(images, features, neighbours, architecture.noise_dim, draws)
        batch = config.batch_size // (loop.ranks.size * loop.accumulate)

        def score(made: torch.Tensor, condition: torch.Tensor, groups: int) -> torch.Tensor:
            augmented = diff_augment(made, draws, translation=config.translation, cutout=config.cutout, groups=groups)
            scores: torch.Tensor = discriminator(augmented, condition)
            return scores.float()

        def discriminator_loss() -> torch.Tensor:
            noise, condition = pairs.noise(batch)
            with torch.no_grad():
                made = generator(noise, condition)
            real, real_condition = pairs.real(batch)
            scores = score(torch.cat([real, made.float()]), torch.cat([real_condition, condition]), groups=2)
            on_real, on_made = scores.chunk(2)
            return F.relu(1 - on_real).mean() + F.relu(1 + on_made).mean()

        def generator_loss() -> torch.Tensor:
            noise, condition = pairs.noise(batch)
            return -score(generator(noise, condition), condition, groups=1).mean()

        # --- steps ---
        def descend(
            network: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]
        ) -> tuple[float, bool]:
            return loop.descend(network, optimizer, [loss_of] * loop.accumulate)

        def step(number: int) -> tuple[Sequence[float], bool]:
            for _ in range(config.discriminator_steps):
                value, _ = descend(discriminator, discriminator_optimizer, discriminator_loss)
            discriminator.requires_grad_(False)
            adversarial, stop = descend(generator, generator_optimizer, generator_loss)
            discriminator.requires_grad_(True)
            average_into(average, generator, number, config.ema_decay)
            return [value, adversarial], stop

        loop.run(
            STAGE,
            config.steps,
            config.batch_size,
            [generator_optimizer, discriminator_optimizer],
            step,
            {
                "generator": generator,
                "discriminator": discriminator,
                "average": average,
                "generator optimizer": generator_optimizer,
                "discriminator optimizer": discriminator_optimizer,
                "draws": draws,
            },
            average=average,
            publish=lambda place, network: self._publish_copy(place, network, images, features),
        )
        # --- statistics ---
        if loop.ranks.size > 1:
            synchronise_batch_norm(average, loop.device)
        measure_statistics(average, pairs, loop.ranks.size)
        return average.eval()

    def _publish_copy(self, place: Path, network: nn.Module, images: Images, features: torch.Tensor) -> GeneratorConfig:
        """Writes a copy with statistics of its own; looking at a training must not change it."""
        measured = copy.deepcopy(network)
        assert isinstance(measured, GeneratorNetwork)
        draws = Draws("look")  # of this rank alone
        measure_statistics(measured, _Pairs(images, features, torch.empty(0), measured.architecture.noise_dim, draws))
        return self.publish(place, measured)

    def write(self, place: Path, network: nn.Module) -> ICGANConfig:
        """See the base class."""
        assert isinstance(network, GeneratorNetwork)
        write_tensors(place / WEIGHTS, network.state_dict())
        facts = {"_class_name": CLASS, "format": FORMAT, "architecture": network.architecture.to_json()}
        (place / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
        return ICGANConfig(model=str(place))


@dataclass
class _Pairs:
    """Draws batches of features with real images, or with noise, from one stream; each rank its own rows."""

    images: Images
    features: torch.Tensor
    neighbours: torch.Tensor
    noise_dim: int
    draws: Draws

    def instances(self, count: int) -> torch.Tensor:
        return self.draws.integers(0, len(self.features), count)

    def real(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images float [B, 3, S, S] in [-1, 1], each a neighbour of the instance whose feature [B, D] it has.

        Equation 2 of the paper: instances uniform, neighbours uniform.
        """
        rows = self.instances(count)
        columns = self.draws.integers(0, self.neighbours.shape[1], count)
        chosen = self.neighbours[rows, columns]
        return self.images[chosen].float() / 127.5 - 1, self.features[rows].to(self.images.device)

    def noise(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns noise float [B, Z] and features [B, D] for the generator."""
        noise = self.draws.normal(count, self.noise_dim)
        return noise.to(self.images.device), self.features[self.instances(count)].to(self.images.device)


@torch.no_grad()
def measure_statistics(network: GeneratorNetwork, pairs: _Pairs, ranks: int = 1) -> None:
    """Sets the batch-norm statistics of averaged weights: the mean over batches of all instances with fresh noise.

    Statistics gathered during training belong to weights that changed meanwhile (BigGAN's "standing statistics").
    Several ranks, whose batch norms are synchronised, share every batch.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over all batches
    network.train()
    batch = min(STATISTICS_BATCH, len(pairs.features))
    for _ in range(STATISTICS_PASSES * max(1, len(pairs.features) // batch)):
        network(*pairs.noise(max(1, batch // ranks)))
    network.eval()


class DownBlock(nn.Module):
    """Residual block with spectral norm; halves the side by averaging if told, maps channels."""

    def __init__(self, inputs: int, outputs: int, *, activate_first: bool, halve: bool) -> None:
        super().__init__()
        self.activate_first = activate_first
        self.halve = halve
        self.conv1 = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x [B, C, h, w] to [B, C', h / 2, w / 2], or to [B, C', h, w]."""
        h = F.relu(x) if self.activate_first else x
        out: torch.Tensor = self.conv2(F.relu(self.conv1(h))) + self.shortcut(x)
        return F.avg_pool2d(out, 2) if self.halve else out


class Discriminator(nn.Module):
    """Projection discriminator (Miyato & Koyama 2018, arXiv 1802.05637) over images and instance features.

    Each block of `channels` halves the side; one more does not.
    """

    def __init__(self, channels: list[int], feature_dim: int) -> None:
        super().__init__()
        blocks = [
            DownBlock(inputs, outputs, activate_first=number > 0, halve=True)
            for number, (inputs, outputs) in enumerate(pairwise([3, *channels]))
        ]
        blocks.append(DownBlock(channels[-1], channels[-1], activate_first=True, halve=False))
        self.blocks = nn.Sequential(*blocks)
        self.realness = spectral_norm(nn.Linear(channels[-1], 1))
        self.project = spectral_norm(nn.Linear(feature_dim, channels[-1]))

    def forward(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Scores how real images are and how well they fit their feature.

        Args:
            images: float [B, 3, S, S] in [-1, 1].
            features: float [B, feature_dim].

        Returns:
            float [B]: `linear(h) + <project(feature), h>`, with h the last feature map summed over positions.
        """
        h = F.relu(self.blocks(images)).sum(dim=(2, 3))
        projected = self.project(features)
        scores: torch.Tensor = self.realness(h)[:, 0] + (projected * h).sum(dim=1)
        return scores


def diff_augment(
    images: torch.Tensor, draws: Draws, *, translation: float, cutout: float, groups: int = 1
) -> torch.Tensor:
    """Shifts images and blanks a square in them, differentiably, a draw a row (Zhao et al. 2020, arXiv 2006.10738).

    Args:
        images: float [B, C, S, S] in [-1, 1].
        draws: random stream.
        translation: largest shift as a part of the side; what comes in from outside is 0.
        cutout: side of the blank square as a part of the image's; 0 leaves it out.
        groups: the images are so many batches, one after the other; see `Draws.own`.
    """
    batch, _, height, width = images.shape
    rows, columns = torch.arange(height), torch.arange(width)

    def two_integers(low: int, high: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = draws.integer_columns(2, low, high, batch, groups)
        return first.view(-1, 1), second.view(-1, 1)

    if (shift := round(translation * height)) > 0:
        down, right = two_integers(-shift, shift + 1)
        from_rows = (rows - down + shift).clamp(0, height + 2 * shift - 1).to(images.device)
        from_columns = (columns - right + shift).clamp(0, width + 2 * shift - 1).to(images.device)
        padded = F.pad(images, (shift,) * 4)
        which = torch.arange(batch, device=images.device)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[which, from_rows[:, :, None], from_columns[:, None, :]].permute(0, 3, 1, 2)
    if (side := round(cutout * height)) > 0:
        top, left = two_integers(1 - side, height)
        outside_rows = (rows < top) | (rows >= top + side)
        outside_columns = (columns < left) | (columns >= left + side)
        images = images * (outside_rows[:, :, None] | outside_columns[:, None, :])[:, None].to(images)
    return images
