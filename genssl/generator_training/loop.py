"""The loop over the steps of a stage of a generator's training, its precision and ranks, checkpoints, averaged weights.

Among several ranks the gradients are averaged over them after every step's last micro-batch. `DistributedDataParallel`
listens to one module's forward; the losses here run through several networks, and some through one of them twice.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from genssl.base.batch_norm import synchronise_batch_norm
from genssl.base.ranks import ALONE, Ranks
from genssl.base.saved_state import DamagedError, read_state, write_state
from genssl.errors import UserError
from genssl.generator_training.rows import Batches, Draws, Images
from genssl.generator_training.watching import Publish, Watch
from genssl.training.stopping import Stopped
from genssl.training.update import DTYPES

CHECKPOINT = ".checkpoint.pt"

Report = Callable[[str, int, int, float, int], None]
"""Called with (stage, step, steps, loss, images a step)."""

Network = TypeVar("Network", bound=nn.Module)


class Stateful(Protocol):
    """A network, an optimiser, a random stream: a part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint needs."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Goes on where `state` was taken."""
        ...


class Lengths(Protocol):
    """A section of a recipe that says how a network is trained."""

    @property
    def batch_size(self) -> int:
        """Images a step, of all ranks together."""
        ...

    @property
    def lr(self) -> float:
        """The learning rate at its peak."""
        ...


class DivergedError(UserError):
    """A loss that became NaN or infinite; the same training would come to it again."""


class Checkpoints:
    """The states of the stages of one training, hidden files in the folder that is being made.

    A stage saves its state every so many seconds, and at its end. The first rank reads and writes for all.
    """

    def __init__(self, folder: Path, every_seconds: float = 60.0, ranks: Ranks = ALONE) -> None:
        self._folder, self._every, self._saved, self._ranks = folder, every_seconds, time.monotonic(), ranks

    def load(self, stage: str) -> dict[str, Any] | None:
        """Returns the state that a killed process saved last; None if it saved none."""
        path = self._path(stage)
        own: dict[str, Any] | None = None
        if self._ranks.first and path.is_file():
            try:
                own = read_state(path)
            except DamagedError as error:
                raise UserError(f"{path} is damaged ({error}); remove it to begin the stage {stage!r} again") from None
        state: dict[str, Any] | None = self._ranks.gather(own)[0]
        return state

    def due(self) -> bool:
        """Says whether it is time to save again; on ranks other than the first, never."""
        return self._ranks.first and time.monotonic() - self._saved >= self._every

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Writes tensors and plain values, whole or not at all."""
        if self._ranks.first:
            write_state(self._path(stage), state)
            self._saved = time.monotonic()

    def _path(self, stage: str) -> Path:
        return self._folder / f".{stage.replace(' ', '-')}{CHECKPOINT}"


@dataclass(frozen=True)
class Loop:
    """What every stage of a training is given: where and how to compute, and whom to tell.

    Attributes:
        device: of the networks.
        checkpoints: where the states of the stages are kept.
        report: called after every step.
        ranks: this process among those that share every batch.
        precision: "fp32", or "bf16": the forward pass under autocast.
        channels_last: the memory order of convolutions.
        accumulate: micro-batches a step.
        watch: looks at what the last stage makes while it is trained.
        asked_to_stop: says whether the training is to be saved after the step that is under way, and left.
    """

    device: torch.device
    checkpoints: Checkpoints
    report: Report = lambda stage, step, steps, loss, images: None
    ranks: Ranks = ALONE
    precision: str = "fp32"
    channels_last: bool = False
    accumulate: int = 1
    watch: Watch | None = None
    asked_to_stop: Callable[[], bool] = lambda: False

    def prepare(self, module: nn.Module) -> None:
        """Moves a module that is to be trained to the device, its batch norms to the statistics of all ranks."""
        module.to(self.device)
        if self.channels_last:
            module.to(memory_format=torch.channels_last)
        if self.ranks.size > 1:
            synchronise_batch_norm(module, self.device)

    def averaged(self, module: Network) -> Network:
        """Returns a frozen copy on the device, to be averaged into; of a module that was not prepared yet."""
        return copy.deepcopy(module).to(self.device).eval().requires_grad_(False)

    def parts(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields this rank's rows of each micro-batch of a step, int64 [B / accumulate / ranks]."""
        for part in rows.chunk(self.accumulate):
            yield part.chunk(self.ranks.size)[self.ranks.rank]

    def autocast(self) -> AbstractContextManager[Any]:
        """Inside, networks compute in the recipe's precision."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, DTYPES[self.precision])

    def average_gradients(self, module: nn.Module) -> None:
        """Replaces a module's gradients by their mean over the ranks."""
        if self.ranks.size == 1:
            return
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one message for all
        dist.all_reduce(flat)
        flat /= self.ranks.size
        means = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def descend(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: Iterable[Callable[[], torch.Tensor]],
        clip: float | None = None,
    ) -> tuple[float, bool]:
        """Takes one step of an optimiser, on the mean loss of the micro-batches of all ranks.

        Args:
            module: whose gradients are averaged over the ranks.
            optimizer: of its parameters.
            losses: computes the loss of each of this rank's micro-batches.
            clip: the largest norm of the gradients.

        Returns:
            The mean loss, and whether a rank was asked to stop.
        """
        optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for loss_of in losses:
            with self.autocast():
                loss = loss_of()
            (loss / self.accumulate if self.accumulate > 1 else loss).backward()  # type: ignore[no-untyped-call]
            value += loss.item() / self.accumulate
        self.average_gradients(module)
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        return self.ranks.agree(value, self.asked_to_stop(), self.device)

    def run(
        self,
        stage: str,
        steps: int,
        batch_size: int,
        optimizers: Sequence[torch.optim.Optimizer],
        step: Callable[[int], tuple[Sequence[float], bool]],
        parts: dict[str, Stateful],
        *,
        average: nn.Module | None = None,
        publish: Publish | None = None,
    ) -> None:
        """Runs the steps of a stage, with warm-up and cosine decay of the learning rates.

        A stage that a killed process left is taken up after the step that it saved last, and ends with the same
        weights.

        Args:
            stage: name in reports and of the checkpoint.
            steps: of the whole stage.
            batch_size: images a step, of all ranks.
            optimizers: with their learning rates at the peak.
            step: takes the step of a number from 0; returns its losses, of which the first is reported, and whether to
                stop.
            parts: all that changes from step to step, by name; saved in checkpoints.
            average: the averaged network among them.
            publish: writes `average` as a generator, which `watch` looks at.

        Raises:
            DivergedError: naming stage and step, if a loss is not finite.
            Stopped: after the state was saved, if the user wants to go on later.
        """
        # --- take up what was saved ---
        watch = self.watch if publish is not None else None
        if watch is not None:
            watch.begin(stage)
            parts = {**parts, "watch": watch}
        first = 0
        if (state := self.checkpoints.load(stage)) is not None:
            if "optimizers" in state:  # an IC-GAN's, saved by genssl 0.1
                names = ("generator optimizer", "discriminator optimizer")
                state |= dict(zip(names, state["optimizers"], strict=True)) | {"draws": {"generator": state["draws"]}}
            first = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        # --- steps ---
        warmup = max(1, min(100, steps // 10))
        peaks = [optimizer.defaults["lr"] for optimizer in optimizers]
        for number in range(first, steps):
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * warm_cosine(number, steps, warmup)
            losses, stop = step(number)
            for loss in losses:
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"{stage}: the loss became {loss} at step {number}; lower its lr (it is {peaks[-1]:g})"
                    )
            done = number + 1
            self.report(stage, done, steps, losses[0], batch_size)
            if watch is not None and publish is not None and average is not None and watch.due(done, steps):
                done = steps if watch.look(done, losses[0], average, publish) else done
            if done == steps or stop or self.checkpoints.due():
                self.checkpoints.save(stage, {"step": done} | {name: part.state_dict() for name, part in parts.items()})
            if stop:
                raise Stopped(f"{stage}, step {done} of {steps}")
            if done == steps:
                break
        if watch is not None and average is not None:
            watch.restore_best(average)


def fit(
    stage: str,
    module: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    config: Lengths,
    draws: Draws,
    loop: Loop,
    *,
    count: int,
    steps: int | None = None,
    epochs: int = 1,
    images: Images | None = None,
    average: nn.Module | None = None,
    ema_decay: float = 0.0,
    publish: Publish | None = None,
) -> None:
    """Minimises a loss over rows by AdamW, as one stage of `Loop.run`; freezes the module at the end.

    Args:
        stage: name in reports and of the checkpoint.
        module: trained, on the loop's device.
        loss_of: returns the loss of the rows of one rank's micro-batch, int64 [B]; it draws from `draws` alone.
        config: batch size and learning rate.
        draws: the stage's random stream.
        loop: device, precision, ranks, checkpoints.
        count: of the rows.
        steps: of the whole stage; by default those of `epochs`.
        epochs: passes over all rows.
        images: whose coming rows are read ahead.
        average: `loop.averaged(module)`, which follows the module by `ema_decay` after every step.
        publish: see `Loop.run`.
    """
    loop.prepare(module)
    rows = Batches(count, config.batch_size, draws)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    module.train()

    def step(number: int) -> tuple[Sequence[float], bool]:
        batch = next(rows)
        if images is not None and len(following := rows.following()) > 0:
            for part in loop.parts(following):
                images.read_ahead(part)
        value, stop = loop.descend(module, optimizer, (partial(loss_of, part) for part in loop.parts(batch)), clip=1.0)
        if average is not None:
            average_into(average, module, number, ema_decay)
        return [value], stop

    parts: dict[str, Stateful] = {"module": module, "optimizer": optimizer, "rows": rows}
    if average is not None:
        parts["average"] = average
    if steps is None:
        steps = epochs * (count // config.batch_size)
    loop.run(stage, steps, config.batch_size, [optimizer], step, parts, average=average, publish=publish)
    module.eval().requires_grad_(False)


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Returns the factor of the learning rate: a linear warm-up under half a cosine, whichever is smaller."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def average_into(average: nn.Module, current: nn.Module, step: int, decay: float) -> None:
    """Moves averaged parameters towards the current ones after a step (from 0).

    average = d * average + (1 - d) * current, with d = `decay`, or less in the first steps, as long as what is averaged
    is still far from trained.
    """
    early = min(decay, (step + 1) / (step + 10))
    for kept, now in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(now, 1 - early)
