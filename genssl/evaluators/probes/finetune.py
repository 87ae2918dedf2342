"""Fine-tuning: how good a start the encoder is for training on labels, all of them or a few."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genssl.base.devices import seeded_initialisation, stream
from genssl.data.base import ImageDataset
from genssl.errors import UserError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder, as_float
from genssl.evaluators.configs import FinetuneConfig
from genssl.views.augment import Augment
from genssl.views.read import augmented

MOMENTUM = 0.9
EVALUATED = 256  # images at a time


class Finetune(EvaluatorBase[FinetuneConfig]):
    """Trains a copy of the encoder and a linear head on it; nothing is chosen on the test split, which is used once.

    The last epoch is tested. Learning rates fall to 0 by a cosine; biases and normalisations have no weight decay; the
    batch norms of the copy follow the data, in batches of at least `batch_size`. The head starts at zero, so that its
    first gradients do not disturb the encoder.
    """

    Config = FinetuneConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if a class has no image, or if there is one class."""
        data.require_per_class(1, "evaluate.finetune")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("top1", accuracy)."""
        config = self._config
        rows, labels = labelled_part(data.train, config.label_fraction, config.seed)
        with _own_streams(encoder.device, "finetune", config.seed):
            dim = encoder.encode_rows(data.train, rows[:1]).shape[1]
            model = _Classifier(encoder.copy_of_module(), dim, data.num_classes).to(encoder.device)
            steps = self._train(model, data.train, rows, labels, encoder.device)
        test_rows = [row for row in range(len(data.test)) if data.test.label(row) >= 0]
        accuracy = _accuracy(model, data.test, test_rows, encoder.device)
        self.protocol = {
            **config.model_dump(exclude={"name", "augmentation"}),
            "augmentation": config.augmentation.settings(),
            "steps": steps,
            "trained_on": len(rows),
            "labels_per_class": np.bincount(labels, minlength=data.num_classes).tolist(),
            "schedule": "cosine to 0",
            "tested_on": data.test_name,
            "tested": len(test_rows),
        }
        yield "top1", accuracy

    def _train(
        self, model: _Classifier, dataset: ImageDataset, rows: list[int], labels: list[int], device: torch.device
    ) -> int:
        config = self._config
        optimizer = _optimizer(model, config)
        peaks = [group["lr"] for group in optimizer.param_groups]
        augment = Augment(config.augmentation, dataset.image_size)
        # Parts of nearly one size, none below batch_size unless all images are: a batch norm cannot see one image.
        batches = max(1, len(rows) // config.batch_size)
        epochs = max(config.epochs, math.ceil(config.min_steps / batches))
        model.train()
        for epoch in range(epochs):
            order = torch.randperm(len(rows), generator=stream("finetune", config.seed, epoch)).numpy()
            for number, part in enumerate(np.array_split(order, batches)):
                done = (epoch * batches + number) / (epochs * batches)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done))
                draws = stream("finetune augment", config.seed, epoch, number)
                views = augmented(dataset, [rows[i] for i in part], augment, draws, device)
                loss = F.cross_entropy(model(views), torch.tensor([labels[i] for i in part], device=device))
                if not loss.isfinite():
                    raise UserError(
                        f"evaluate.finetune: the loss became {loss.item()} in epoch {epoch}; lower encoder_lr (it is "
                        f"{config.encoder_lr:g}) or head_lr (it is {config.head_lr:g})"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return epochs * batches


class _Classifier(nn.Module):
    def __init__(self, encoder: Any, dim: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder.encode(images))
        return logits


def labelled_part(dataset: ImageDataset, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns rows and labels of a part of every class, at least one image each.

    A smaller part lies within a larger one of the same seed.
    """
    labels = np.array([dataset.label(row) for row in range(len(dataset))])
    chosen: list[int] = []
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        order = torch.randperm(len(rows), generator=stream("finetune labels", seed, label)).numpy()
        chosen += rows[order[: max(1, round(fraction * len(rows)))]].tolist()
    chosen.sort()
    return chosen, labels[chosen].tolist()


def _optimizer(model: _Classifier, config: FinetuneConfig) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for module, lr in ((model.encoder, config.encoder_lr), (model.head, config.head_lr)):
        for vectors in (False, True):
            members = [parameter for parameter in module.parameters() if (parameter.ndim <= 1) == vectors]
            groups.append({"params": members, "lr": lr, "weight_decay": 0.0 if vectors else config.weight_decay})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, lr=config.encoder_lr, momentum=MOMENTUM)


def _accuracy(model: _Classifier, dataset: ImageDataset, rows: list[int], device: torch.device) -> float:
    model.eval()
    right = 0
    for start in range(0, len(rows), EVALUATED):
        part = rows[start : start + EVALUATED]
        images = torch.from_numpy(np.stack([dataset.image(row) for row in part])).to(device)
        with torch.inference_mode():
            predicted = model(as_float(images)).argmax(dim=1).cpu()
        right += int((predicted == torch.tensor([dataset.label(row) for row in part])).sum())
    return right / len(rows)


@contextmanager
def _own_streams(device: torch.device, *parts: object) -> Iterator[None]:
    """Inside, dropout draws from streams named by `parts`; afterwards torch's own are as they were before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), seeded_initialisation(*parts):
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(stream(*parts).initial_seed())
        yield
