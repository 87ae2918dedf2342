"""Makes the conditioner of a generator: copies the encoder of a run, or trains a small one by SimCLR; no labels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from genssl.base.devices import seeded_initialisation
from genssl.base.ranks import Ranks
from genssl.config.base import ComponentConfig
from genssl.config.generator_recipes.sections import ConditionerConfig
from genssl.errors import GeneratorError, UserError
from genssl.generator_training.loop import Loop, fit
from genssl.generator_training.rows import Draws, Images
from genssl.generators.conditioner import FILE, Conditioner, load_encoder, save_encoder
from genssl.methods.base import Views
from genssl.methods.configs import SimCLRConfig
from genssl.methods.simclr import SimCLR
from genssl.registry import BACKBONES
from genssl.views.augment import Augment


def conditioner_problems(config: ConditionerConfig) -> list[str]:
    """Returns what cannot work, as lines "key: problem", before anything is trained; batches apart."""
    if config.run is not None and not (config.run / FILE).is_file():
        return [f"conditioner.run: {config.run} has no {FILE}; give the directory of a finished run"]
    return []


def conditioner_batches(config: ConditionerConfig | None) -> dict[str, int]:
    """Returns the batch size of the conditioner's training, if there is one, as `batch_problems` takes it."""
    return {} if config is None or config.run is not None else {"conditioner": config.batch_size}


def make_conditioner(config: ConditionerConfig, images: Images, seed: int, loop: Loop, folder: Path) -> Conditioner:
    """Writes `encoder.safetensors` into a generator's folder and returns the conditioner that it holds.

    Its image size is the side of the images, whatever the size that a run's encoder was trained on.
    """
    if config.run is not None:
        try:
            backbone, block, _ = load_encoder(config.run / FILE)
        except GeneratorError as error:
            raise UserError(f"conditioner.run: {error}") from None
    else:
        assert config.backbone is not None, "the config has one of both"
        block = config.backbone
        backbone = _train(config, block, images, seed, loop)
    if loop.ranks.first:
        save_encoder(folder / FILE, backbone, block, image_size=str(images.size))
    return Conditioner(backbone, images.size, loop.device)


def embed_all(conditioner: Conditioner, images: Images, ranks: Ranks) -> torch.Tensor:
    """Returns the embeddings float32 [N, D] (CPU) of all images, of which each rank computes its part."""
    bounds = [len(images) * rank // ranks.size for rank in range(ranks.size + 1)]
    own = range(bounds[ranks.rank], bounds[ranks.rank + 1])
    parts = [conditioner.embed(part) for part in images.parts(own)]
    return torch.cat(ranks.gather(torch.cat(parts).clone()))


def nearest_neighbours(embeddings: torch.Tensor, k: int, device: torch.device) -> torch.Tensor:
    """Returns the rows int64 [N, k] (CPU) of the k < N most similar other embeddings (cosine), the nearest first."""
    unit = torch.nn.functional.normalize(embeddings.to(device), dim=1)
    found = []
    for start in range(0, len(unit), 1024):
        similarity = unit[start : start + 1024] @ unit.T
        rows = torch.arange(len(similarity), device=device)
        similarity[rows, start + rows] = -torch.inf  # not itself
        found.append(similarity.topk(k, dim=1).indices.cpu())
    return torch.cat(found)


def _train(config: ConditionerConfig, block: ComponentConfig, images: Images, seed: int, loop: Loop) -> nn.Module:
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
        )
    augment, draws = Augment(config.augmentation, images.size), Draws(seed, "conditioner", ranks=loop.ranks)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        batch = images[rows].float() / 255
        return method.step(Views(pair=(draws.view(augment, batch), draws.view(augment, batch)))).loss

    fit("conditioner", method, loss_of, config, draws, loop, count=len(images), epochs=config.epochs, images=images)
    return backbone
