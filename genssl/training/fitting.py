"""What the trainers of generators share: batches of rows, the optimiser's loop, its checkpoints, averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from genssl.data.base import ImageDataset
from genssl.errors import UserError
from genssl.training.files import write_atomically

CHECKPOINT = ".checkpoint.pt"

Report = Callable[[str, int, int, float], None]
"""Called with (stage, step, steps, loss)."""


def load_images(dataset: ImageDataset, device: torch.device) -> torch.Tensor:
    """Returns every image of a split as uint8 [N, 3, S, S] on the training device."""
    return torch.from_numpy(np.stack([dataset.image(row) for row in range(len(dataset))])).to(device)


class Batches(Iterator[torch.Tensor]):
    """Row numbers int64 [batch_size] for ever, each epoch in a new order, incomplete batches left out.

    Args:
        count: of the rows.
        batch_size: at most `count`.
        generator: the stage's random stream, which its loss may draw from as well; it is part of the state.
    """

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        self._count, self._batch_size, self._generator = count, batch_size, generator
        self._order, self._start = torch.empty(0, dtype=torch.int64), 0

    def __next__(self) -> torch.Tensor:
        if self._start + self._batch_size > len(self._order):
            self._order, self._start = torch.randperm(self._count, generator=self._generator), 0
        self._start += self._batch_size
        return self._order[self._start - self._batch_size : self._start]

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on with the next batch and the next draw."""
        return {"order": self._order, "start": self._start, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._order, self._start = state["order"], state["start"]
        self._generator.set_state(state["generator"])


class Checkpoints:
    """The states of the stages of one training, hidden files in the folder that is being made.

    Args:
        folder: the generator's, not yet published; `genssl train-generator` removes the files before it is.
        every_seconds: how often a stage saves its state; the end of a stage is always saved.
    """

    def __init__(self, folder: Path, every_seconds: float = 60.0) -> None:
        self._folder, self._every, self._saved = folder, every_seconds, time.monotonic()

    def load(self, stage: str) -> dict[str, Any] | None:
        """Returns the state that a killed process saved last; None if it saved none."""
        path = self._path(stage)
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def due(self) -> bool:
        """Says whether it is time to save again."""
        return time.monotonic() - self._saved >= self._every

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Writes tensors and plain values, whole or not at all."""
        write_atomically(self._path(stage), lambda partial: torch.save(state, partial))
        self._saved = time.monotonic()

    def _path(self, stage: str) -> Path:
        return self._folder / f".{stage.replace(' ', '-')}{CHECKPOINT}"


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Returns the factor of the learning rate: a linear warm-up under half a cosine, whichever is smaller."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def check_finite(stage: str, step: int, loss: float, lr: float) -> None:
    """Raises UserError naming the step (from 0) if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"{stage}: the loss became {loss} at step {step}; lower its lr (it is {lr:g})")


def fit(
    stage: str,
    module: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    rows: Batches,
    steps: int,
    lr: float,
    report: Report,
    *,
    checkpoints: Checkpoints,
    average: nn.Module | None = None,
) -> Iterator[int]:
    """Minimises `loss_of(rows)` with AdamW, warm-up and cosine decay; yields after every step, freezes at the end.

    A stage that a killed process left is taken up after the step that it saved last, and ends with the same weights.

    Args:
        stage: name in reports and of the checkpoint.
        module: trained.
        loss_of: the loss of the rows it is given; it draws from the stream of `rows` alone.
        rows: endless batches.
        steps: of the whole stage.
        lr: at the peak.
        report: called after every step.
        checkpoints: where the stage's state is kept.
        average: a module that the caller changes after every step; part of the state.

    Raises:
        UserError: naming stage and step, if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    warmup = max(1, min(100, steps // 10))
    module.train()
    first = 0
    if (state := checkpoints.load(stage)) is not None:
        first = state["step"]
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        rows.load_state_dict(state["rows"])
        if average is not None:
            average.load_state_dict(state["average"])
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = lr * warm_cosine(step, steps, warmup)
        loss = loss_of(next(rows))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        value = loss.item()
        check_finite(stage, step, value, lr)
        report(stage, step + 1, steps, value)
        yield step
        if checkpoints.due() or step + 1 == steps:
            state = {
                "step": step + 1,
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rows": rows.state_dict(),
                "average": None if average is None else average.state_dict(),
            }
            checkpoints.save(stage, state)
    module.eval().requires_grad_(False)


@torch.no_grad()
def average_into(average: nn.Module, current: nn.Module, decay: float) -> None:
    """Moves the averaged parameters towards the current ones: average = decay * average + (1 - decay) * current."""
    for kept, now in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(now, 1 - decay)
