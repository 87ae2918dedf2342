"""Makes the conditioner of a generator: copies the encoder of a run, or trains a small one by SimCLR; no labels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from genssl.config.base import ComponentConfig
from genssl.config.conditioner_recipe import ConditionerConfig
from genssl.errors import GeneratorError, UserError
from genssl.generators.conditioner import FILE, Conditioner, load_encoder, save_encoder
from genssl.methods.base import Views
from genssl.methods.configs import SimCLRConfig
from genssl.methods.simclr import SimCLR
from genssl.registry import BACKBONES
from genssl.runtime import seeded_initialisation, stream
from genssl.training.fitting import Batches, Checkpoints, Report, fit
from genssl.views.augment import Augment


def conditioner_problems(config: ConditionerConfig, images: int) -> list[str]:
    """Returns what cannot work with so many training images, as lines "key: problem", before anything is trained."""
    if config.run is not None and not (config.run / FILE).is_file():
        return [f"conditioner.run: {config.run} has no {FILE}; give the directory of a finished run"]
    if config.run is None and config.batch_size > images:
        return [f"conditioner.batch_size: {config.batch_size} is more than the {images} training images"]
    return []


def make_conditioner(
    config: ConditionerConfig, images: torch.Tensor, seed: int, report: Report, folder: Path
) -> Conditioner:
    """Writes `encoder.safetensors` into a generator's folder and returns the conditioner that it holds.

    Args:
        config: a run directory, or what is trained here.
        images: uint8 [N, 3, S, S] on the training device, whose S becomes the conditioner's image size.
        seed: of weights and draws.
        report: called with the progress.
        folder: the generator's; it exists.

    Raises:
        UserError: if the run's encoder cannot be read, or the loss is not finite.
    """
    size = int(images.shape[-1])
    if config.run is not None:
        try:
            backbone, block, _ = load_encoder(config.run / FILE)
        except GeneratorError as error:
            raise UserError(f"conditioner.run: {error}") from None
    else:
        assert config.backbone is not None, "the config has one of both"
        block = config.backbone
        backbone = _train(config, block, images, seed, report, Checkpoints(folder))
    save_encoder(folder / FILE, backbone, block, size)
    return Conditioner.load(folder, images.device)


def embed_all(conditioner: Conditioner, images: torch.Tensor) -> torch.Tensor:
    """Returns the embeddings float32 [N, D] (CPU) of images uint8 [N, 3, S, S]."""
    return torch.cat([conditioner.embed(part) for part in torch.split(images, 512)]).clone()


def nearest_neighbours(embeddings: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the rows int64 [N, k] of the k most similar other embeddings (cosine), the nearest first.

    Args:
        embeddings: float [N, D].
        k: below N.
    """
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    found = []
    for start in range(0, len(unit), 1024):
        similarity = unit[start : start + 1024] @ unit.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -torch.inf  # not itself
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)


def _train(
    config: ConditionerConfig,
    block: ComponentConfig,
    images: torch.Tensor,
    seed: int,
    report: Report,
    checkpoints: Checkpoints,
) -> nn.Module:
    """Trains a backbone by SimCLR and returns it, frozen."""
    with seeded_initialisation(seed, "conditioner"):
        backbone: nn.Module = BACKBONES.get(block.name)(block)
        method = SimCLR(
            SimCLRConfig(
                projector_hidden_dim=config.projector_hidden_dim,
                projector_output_dim=config.projector_output_dim,
                temperature=config.temperature,
            ),
            backbone,
        ).to(images.device)
    augment, draws = Augment(config.augmentation, int(images.shape[-1])), stream(seed, "conditioner")

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = images[rows.to(images.device)].float() / 255
        return method.step(Views(pair=(augment(batch, draws), augment(batch, draws)))).loss

    steps = config.epochs * (len(images) // config.batch_size)
    rows = Batches(len(images), config.batch_size, draws)
    for _ in fit("conditioner", method, loss_of, rows, steps, config.lr, report, checkpoints=checkpoints):
        pass
    return backbone
