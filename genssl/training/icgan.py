"""Trains an instance-conditioned GAN (Casanova et al. 2021, arXiv 2109.05070); no labels.

The discriminator sees a feature with a real neighbour of its instance, or with an image made of the feature. Deviations
from the paper, made for small models and short trainings: features have length sqrt(D) (see `Conditioner.embed`), no
spectral norm in the generator, one learning rate that decays to 0, and batch-norm statistics measured afterwards.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from genssl.config.icgan_recipe import ICGANRecipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.generators.configs import ICGANConfig
from genssl.generators.icgan import CLASS, FORMAT, WEIGHTS
from genssl.generators.icgan_networks import Architecture, GeneratorNetwork
from genssl.runtime import seeded_initialisation, stream
from genssl.training.conditioner import conditioner_problems, embed_all, make_conditioner, nearest_neighbours
from genssl.training.fitting import Checkpoints, Report, average_into, check_finite, load_images, warm_cosine
from genssl.training.icgan_discriminator import Discriminator, diff_augment

STAGE = "icgan"
STATISTICS_BATCH = 256
STATISTICS_PASSES = 8


def train_and_save(
    recipe: ICGANRecipe, train: ImageDataset, device: torch.device, report: Report, folder: Path
) -> ICGANConfig:
    """Trains the conditioner, then generator and discriminator on its features; see `Family.trainer`.

    Raises:
        ConfigError: if sizes do not fit each other or the data set; before anything is trained.
        UserError: if a run's encoder cannot be read, or a loss is not finite.
    """
    check_sizes(recipe, train)
    images = load_images(train, device)
    conditioner = make_conditioner(recipe.conditioner, images, recipe.seed, report, folder)
    features = embed_all(conditioner, images)
    network = train_icgan(recipe, images, features, report, Checkpoints(folder))
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(tensors))
    facts = {"_class_name": CLASS, "format": FORMAT, "architecture": network.architecture.to_json()}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return ICGANConfig(model=str(folder))


def check_sizes(recipe: ICGANRecipe, dataset: ImageDataset) -> None:
    """Raises ConfigError with every size that does not fit, one line each."""
    generator, size = recipe.generator, dataset.image_size
    blocks = len(generator.channels) - 1
    problems = conditioner_problems(recipe.conditioner, len(dataset))
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
    if recipe.adversarial.neighbours >= len(dataset):
        problems.append(f"adversarial.neighbours: must be fewer than the {len(dataset)} training images")
    if problems:
        raise ConfigError(problems)


@dataclass
class _Pairs:
    """Draws batches of features with real images, or with noise, from one stream."""

    images: torch.Tensor
    features: torch.Tensor
    neighbours: torch.Tensor
    noise_dim: int
    draws: torch.Generator

    def instances(self, count: int) -> torch.Tensor:
        return torch.randint(len(self.features), (count,), generator=self.draws)

    def real(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images float [B, 3, S, S] in [-1, 1], each a neighbour of the instance whose feature [B, D] it has.

        Equation 2 of the paper: instances uniform, neighbours uniform.
        """
        rows = self.instances(count)
        columns = torch.randint(self.neighbours.shape[1], (count,), generator=self.draws)
        chosen = self.neighbours[rows, columns].to(self.images.device)
        return self.images[chosen].float() / 127.5 - 1, self.features[rows].to(self.images.device)

    def noise(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns noise float [B, Z] and features [B, D] for the generator."""
        noise = torch.randn((count, self.noise_dim), generator=self.draws)
        return noise.to(self.images.device), self.features[self.instances(count)].to(self.images.device)


def train_icgan(
    recipe: ICGANRecipe, images: torch.Tensor, features: torch.Tensor, report: Report, checkpoints: Checkpoints
) -> GeneratorNetwork:
    """Trains both networks and returns the generator's averaged weights with measured batch-norm statistics.

    A training that a killed process left is taken up after the step that it saved last, and ends with the same weights.

    Args:
        recipe: sizes and lengths.
        images: uint8 [N, 3, S, S] on the training device.
        features: float32 [N, D] on the CPU, as `Conditioner.embed` gives them.
        report: called with the progress and the discriminator's loss.
        checkpoints: where the state is kept.
    """
    config, device = recipe.adversarial, images.device
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
        generator = generator.to(device)
        discriminator = Discriminator(recipe.discriminator.channels, architecture.feature_dim).to(device)
    average = copy.deepcopy(generator).requires_grad_(False)
    draws = stream(recipe.seed, "icgan")
    pairs = _Pairs(images, features, nearest_neighbours(features, config.neighbours), architecture.noise_dim, draws)

    def score(made: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        augmented = diff_augment(made, draws, translation=config.translation, cutout=config.cutout)
        scores: torch.Tensor = discriminator(augmented, condition)
        return scores

    optimizers: dict[nn.Module, torch.optim.Adam] = {
        network: torch.optim.Adam(network.parameters(), lr=lr, betas=(0.0, 0.999), eps=1e-6)
        for network, lr in ((generator, config.lr_generator), (discriminator, config.lr_discriminator))
    }
    rates = {network: optimizer.param_groups[0]["lr"] for network, optimizer in optimizers.items()}

    def descend(network: nn.Module, loss: torch.Tensor) -> None:
        optimizers[network].zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizers[network].step()

    modules = {"generator": generator, "discriminator": discriminator, "average": average}
    first = 0
    if (state := checkpoints.load(STAGE)) is not None:
        first = state["step"]
        for name, module in modules.items():
            module.load_state_dict(state[name])
        for optimizer, saved in zip(optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        draws.set_state(state["draws"])
    warmup = max(1, min(100, config.steps // 10))
    for step in range(first, config.steps):
        for network, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[network] * warm_cosine(step, config.steps, warmup)
        for _ in range(config.discriminator_steps):
            noise, condition = pairs.noise(config.batch_size)
            with torch.no_grad():
                made = generator(noise, condition)
            real, real_condition = pairs.real(config.batch_size)
            scores = score(torch.cat([real, made]), torch.cat([real_condition, condition]))
            on_real, on_made = scores.chunk(2)
            loss = F.relu(1 - on_real).mean() + F.relu(1 + on_made).mean()
            descend(discriminator, loss)
        discriminator.requires_grad_(False)
        noise, condition = pairs.noise(config.batch_size)
        generator_loss = -score(generator(noise, condition), condition).mean()
        descend(generator, generator_loss)
        discriminator.requires_grad_(True)
        average_into(average, generator, min(config.ema_decay, (step + 1) / (step + 10)))
        value = loss.item()
        check_finite(STAGE, step, value + generator_loss.item(), config.lr_discriminator)
        report(STAGE, step + 1, config.steps, value)
        if checkpoints.due() or step + 1 == config.steps:
            state = {name: module.state_dict() for name, module in modules.items()}
            state |= {"step": step + 1, "optimizers": [optimizer.state_dict() for optimizer in optimizers.values()]}
            checkpoints.save(STAGE, state | {"draws": draws.get_state()})
    _measure_statistics(average, pairs)
    return average.eval()


@torch.no_grad()
def _measure_statistics(network: GeneratorNetwork, pairs: _Pairs) -> None:
    """Sets the batch-norm statistics of averaged weights: the mean over batches of all instances with fresh noise.

    Statistics gathered during training belong to weights that changed meanwhile (BigGAN's "standing statistics").
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over all batches
    network.train()
    batch = min(STATISTICS_BATCH, len(pairs.features))
    for _ in range(STATISTICS_PASSES * max(1, len(pairs.features) // batch)):
        network(*pairs.noise(batch))
    network.eval()
