"""Trains an instance-conditioned GAN (Casanova et al. 2021, arXiv 2109.05070); no labels.

The discriminator sees a feature with a real neighbour of its instance, or with an image made of the feature. Deviations
from the paper, made for small models and short trainings: features have length sqrt(D) (see `Conditioner.embed`), no
spectral norm in the generator, one learning rate that decays to 0, and batch-norm statistics measured afterwards.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from genssl.base.batch_norm import synchronise_batch_norm
from genssl.base.devices import seeded_initialisation
from genssl.base.ranks import Ranks
from genssl.base.safetensors_file import write_tensors
from genssl.config.generator_recipes.icgan import ICGANRecipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.generator_training.conditioner import (
    conditioner_batches,
    conditioner_problems,
    embed_all,
    make_conditioner,
    nearest_neighbours,
)
from genssl.generator_training.icgan_discriminator import Discriminator, diff_augment
from genssl.generator_training.loop import Loop, average_into, batch_problems, check_finite, warm_cosine
from genssl.generator_training.rows import Draws, Images
from genssl.generator_training.watching import Publish
from genssl.generators.conditioner import FILE
from genssl.generators.configs import ICGANConfig
from genssl.generators.icgan.generator import CLASS, FORMAT, WEIGHTS
from genssl.generators.icgan.networks import Architecture, GeneratorNetwork
from genssl.training.stopping import Stopped

STAGE = "icgan"
STATISTICS_BATCH = 256
STATISTICS_PASSES = 8


def train_and_save(recipe: ICGANRecipe, train: ImageDataset, loop: Loop, folder: Path) -> ICGANConfig:
    """Trains the conditioner, then generator and discriminator on its features; see `Family.trainer`.

    Raises:
        ConfigError: if sizes do not fit each other or the data set; before anything is trained.
        UserError: if a run's encoder cannot be read, or a loss is not finite.
    """
    check_sizes(recipe, train, loop.ranks)
    images = Images(train, loop.device)
    conditioner = make_conditioner(recipe.conditioner, images, recipe.seed, loop, folder)
    features = embed_all(conditioner, images, loop.ranks)

    def publish(place: Path, network: nn.Module) -> ICGANConfig:
        shutil.copyfile(folder / FILE, place / FILE)
        measured = copy.deepcopy(network)
        assert isinstance(measured, GeneratorNetwork)
        # A stream of its own, of this rank alone: looking at a training must not change it.
        measure_statistics(
            measured, _Pairs(images, features, torch.empty(0), measured.architecture.noise_dim, Draws("look"))
        )
        return _write(place, measured)

    network = train_icgan(recipe, images, features, loop, publish)
    return _write(folder, network) if loop.ranks.first else ICGANConfig(model=str(folder))


def _write(folder: Path, network: GeneratorNetwork) -> ICGANConfig:
    write_tensors(folder / WEIGHTS, network.state_dict())
    facts = {"_class_name": CLASS, "format": FORMAT, "architecture": network.architecture.to_json()}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return ICGANConfig(model=str(folder))


def check_sizes(recipe: ICGANRecipe, dataset: ImageDataset, ranks: Ranks) -> None:
    """Raises ConfigError with every size that does not fit, one line each."""
    generator, size = recipe.generator, dataset.image_size
    blocks = len(generator.channels) - 1
    problems = conditioner_problems(recipe.conditioner)
    batches = {"adversarial": recipe.adversarial.batch_size} | conditioner_batches(recipe.conditioner)
    problems += batch_problems(recipe, len(dataset), ranks, **batches)
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


def train_icgan(
    recipe: ICGANRecipe, images: Images, features: torch.Tensor, loop: Loop, publish: Publish | None = None
) -> GeneratorNetwork:
    """Trains both networks and returns the generator's averaged weights with measured batch-norm statistics.

    A training that a killed process left is taken up after the step that it saved last, and ends with the same weights.

    Args:
        recipe: sizes and lengths.
        images: of the train split.
        features: float32 [N, D] on the CPU, as `Conditioner.embed` gives them.
        loop: device, precision, ranks, checkpoints; reports are of the discriminator's loss.
        publish: writes the averaged network as a generator, for `loop.watch`.
    """
    config, device = recipe.adversarial, loop.device
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
    average = copy.deepcopy(generator).to(device).requires_grad_(False)
    loop.prepare(generator)
    loop.prepare(discriminator)
    draws = Draws(recipe.seed, "icgan", ranks=loop.ranks)
    neighbours = nearest_neighbours(features, config.neighbours, device)
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

    optimizers: dict[nn.Module, torch.optim.Adam] = {
        network: torch.optim.Adam(network.parameters(), lr=lr, betas=(0.0, 0.999), eps=1e-6)
        for network, lr in ((generator, config.lr_generator), (discriminator, config.lr_discriminator))
    }
    rates = {network: optimizer.param_groups[0]["lr"] for network, optimizer in optimizers.items()}

    def descend(network: nn.Module, loss_of: Callable[[], torch.Tensor]) -> tuple[float, bool]:
        optimizers[network].zero_grad(set_to_none=True)
        value = 0.0
        for _ in range(loop.accumulate):
            with loop.autocast():
                loss = loss_of()
            (loss / loop.accumulate if loop.accumulate > 1 else loss).backward()  # type: ignore[no-untyped-call]
            value += loss.item() / loop.accumulate
        loop.average_gradients(network)
        optimizers[network].step()
        return loop.agree(value)

    modules = {"generator": generator, "discriminator": discriminator, "average": average}
    watch = loop.watch if publish is not None else None
    if watch is not None:
        watch.begin(STAGE)
    first = 0
    if (state := loop.checkpoints.load(STAGE)) is not None:
        first = state["step"]
        for name, module in modules.items():
            module.load_state_dict(state[name])
        for optimizer, saved in zip(optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        draws.generator.set_state(state["draws"])
        if watch is not None:
            watch.load_state_dict(state["watch"])
    warmup = max(1, min(100, config.steps // 10))
    for step in range(first, config.steps):
        for network, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[network] * warm_cosine(step, config.steps, warmup)
        for _ in range(config.discriminator_steps):
            value, _ = descend(discriminator, discriminator_loss)
        discriminator.requires_grad_(False)
        adversarial, stop = descend(generator, generator_loss)
        discriminator.requires_grad_(True)
        average_into(average, generator, step, config.ema_decay)
        check_finite(STAGE, step, value + adversarial, config.lr_discriminator)
        loop.report(STAGE, step + 1, config.steps, value)
        done = step + 1
        if watch is not None and publish is not None and watch.due(done, config.steps):
            done = config.steps if watch.look(done, value, average, publish) else done
        if done == config.steps or stop or loop.checkpoints.due():
            state = {name: module.state_dict() for name, module in modules.items()}
            state |= {"step": done, "optimizers": [optimizer.state_dict() for optimizer in optimizers.values()]}
            state |= {"draws": draws.generator.get_state(), "watch": None if watch is None else watch.state_dict()}
            loop.checkpoints.save(STAGE, state)
        if stop:
            raise Stopped(f"{STAGE}, step {done} of {config.steps}")
        if done == config.steps:
            break
    if watch is not None:
        watch.restore_best(average)
    if loop.ranks.size > 1:
        synchronise_batch_norm(average, device)
    measure_statistics(average, pairs, loop.ranks.size)
    return average.eval()


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
