"""What the trainers of generators share: a loop over steps, its precision and ranks, checkpoints, averaged weights.

Among several ranks the gradients are averaged over them after every step's last micro-batch. `DistributedDataParallel`
listens to one module's forward; the losses here run through several networks, and some through one of them twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from genssl.base.batch_norm import synchronise_batch_norm
from genssl.base.ranks import ALONE, Ranks
from genssl.base.saved_state import DamagedError, read_state, write_state
from genssl.config.base import Section
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.errors import UserError
from genssl.generator_training.rows import Batches, Images
from genssl.generator_training.watching import Publish, Watch
from genssl.training.stopping import Stopped
from genssl.training.update import DTYPES

CHECKPOINT = ".checkpoint.pt"
NORM_GROUPS = 8  # of every network that is trained here

Report = Callable[[str, int, int, float], None]
"""Called with (stage, step, steps, loss)."""


class DivergedError(UserError):
    """A loss that became NaN or infinite; the same training would come to it again."""


class Checkpoints:
    """The states of the stages of one training, hidden files in the folder that is being made.

    Args:
        folder: the generator's, not yet published; `genssl train-generator` removes the files before it is.
        every_seconds: how often a stage saves its state; the end of a stage is always saved.
        ranks: the first one reads and writes for all.
    """

    def __init__(self, folder: Path, every_seconds: float = 60.0, ranks: Ranks = ALONE) -> None:
        self._folder, self._every, self._saved, self._ranks = folder, every_seconds, time.monotonic(), ranks

    def load(self, stage: str) -> dict[str, Any] | None:
        """Returns the state that a killed process saved last; None if it saved none.

        Raises:
            UserError: if the file is damaged.
        """
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
    report: Report = lambda stage, step, steps, loss: None
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

    def agree(self, loss: float) -> tuple[float, bool]:
        """Returns the mean of a loss over the ranks, and whether one of them was asked to stop."""
        return self.ranks.agree(loss, self.asked_to_stop(), self.device)


def fit_batches(recipe: GeneratorRecipe, images: int, ranks: Ranks) -> tuple[GeneratorRecipe, list[str]]:
    """Returns the recipe with no batch larger than the data set, and a line on each that was: few images train too.

    A batch that even so does not divide among micro-batches and ranks is left to `batch_problems`.
    """
    parts = recipe.accumulate * ranks.size
    most = images // parts * parts
    changed: dict[str, Section] = {}
    notes = []
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        size = getattr(section, "batch_size", None)
        if size is None or size <= images or most < 2 * parts:
            continue
        changed[name] = section.model_copy(update={"batch_size": most})
        given = getattr(section, "run", None) or getattr(section, "model", None)  # then there is nothing to train
        if not given and not (name == "image_encoder" and getattr(recipe, "conditioner", None) is not None):
            notes.append(f"{name}.batch_size: {size} is more than the {images} training images; {most} is taken")
    return recipe.model_copy(update=changed), notes


def batch_problems(recipe: GeneratorRecipe, images: int, ranks: Ranks, **sizes: int) -> list[str]:
    """Returns what is wrong with batch sizes, given as SECTION=size, as lines "key: problem"."""
    problems, parts = [], recipe.accumulate * ranks.size
    for section, size in sizes.items():
        if size > images:
            problems.append(f"{section}.batch_size: {size} is more than the {images} training images")
        elif size % parts or size // parts < 2:
            among = " and ".join(
                told
                for count, told in (
                    (recipe.accumulate, f"{recipe.accumulate} micro-batches (accumulate)"),
                    (ranks.size, f"{ranks.size} ranks"),
                )
                if count > 1
            )
            problems.append(
                f"{section}.batch_size: {size} does not divide among {among or 'one rank'} into equal parts of at "
                f"least 2; set it to a multiple of {parts}"
            )
    return problems


def channel_problems(section: str, channels: list[int]) -> list[str]:
    """Returns what is wrong with the widths of a UNet that is told time and embedding, as lines "key: problem"."""
    if any(count % NORM_GROUPS or count < 2 * NORM_GROUPS for count in channels):
        return [
            f"{section}.block_out_channels: {channels} are not all multiples of {NORM_GROUPS} and at least "
            f"{2 * NORM_GROUPS}; a channel that is normalised alone loses what the network is told"
        ]
    return []


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Returns the factor of the learning rate: a linear warm-up under half a cosine, whichever is smaller."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def check_finite(stage: str, step: int, loss: float, lr: float) -> None:
    """Raises DivergedError naming the step (from 0) if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise DivergedError(f"{stage}: the loss became {loss} at step {step}; lower its lr (it is {lr:g})")


def fit(
    stage: str,
    module: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    rows: Batches,
    steps: int,
    lr: float,
    loop: Loop,
    *,
    images: Images | None = None,
    average: nn.Module | None = None,
    publish: Publish | None = None,
) -> Iterator[int]:
    """Minimises `loss_of(rows)` with AdamW, warm-up and cosine decay; yields after every step, freezes at the end.

    A stage that a killed process left is taken up after the step that it saved last, and ends with the same weights.

    Args:
        stage: name in reports and of the checkpoint.
        module: trained; `loop.prepare` has seen it.
        loss_of: the loss of the rows of one rank's micro-batch; it draws from the stream of `rows` alone.
        rows: endless batches.
        steps: of the whole stage.
        lr: at the peak.
        loop: device, precision, ranks, checkpoints.
        images: whose coming rows are read ahead.
        average: a module that the caller changes after every step; part of the state.
        publish: writes `average` as a generator, which `loop.watch` looks at.

    Raises:
        DivergedError: naming stage and step, if the loss is not finite.
        Stopped: after the state was saved, if `loop.asked_to_stop`.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    warmup = max(1, min(100, steps // 10))
    watch = loop.watch if publish is not None else None
    if watch is not None:
        watch.begin(stage)
    module.train()
    first = 0
    if (state := loop.checkpoints.load(stage)) is not None:
        first = state["step"]
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        rows.load_state_dict(state["rows"])
        if average is not None:
            average.load_state_dict(state["average"])
        if watch is not None:
            watch.load_state_dict(state["watch"])
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = lr * warm_cosine(step, steps, warmup)
        batch, value = next(rows), 0.0
        if images is not None and len(following := rows.following()) > 0:
            for part in loop.parts(following):
                images.read_ahead(part)
        optimizer.zero_grad(set_to_none=True)
        for part in loop.parts(batch):
            with loop.autocast():
                loss = loss_of(part)
            (loss / loop.accumulate if loop.accumulate > 1 else loss).backward()  # type: ignore[no-untyped-call]
            value += loss.item() / loop.accumulate
        loop.average_gradients(module)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        value, stop = loop.agree(value)
        check_finite(stage, step, value, lr)
        loop.report(stage, step + 1, steps, value)
        yield step
        done = step + 1
        if watch is not None and publish is not None and average is not None and watch.due(done, steps):
            done = steps if watch.look(done, value, average, publish) else done
        if done == steps or stop or loop.checkpoints.due():
            state = {
                "step": done,
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rows": rows.state_dict(),
                "average": None if average is None else average.state_dict(),
                "watch": None if watch is None else watch.state_dict(),
            }
            loop.checkpoints.save(stage, state)
        if stop:
            raise Stopped(f"{stage}, step {done} of {steps}")
        if done == steps:
            break
    if watch is not None and average is not None:
        watch.restore_best(average)
    module.eval().requires_grad_(False)


@torch.no_grad()
def average_into(average: nn.Module, current: nn.Module, step: int, decay: float) -> None:
    """Moves averaged parameters towards the current ones after a step (from 0).

    average = d * average + (1 - d) * current, with d = `decay`, or less in the first steps, as long as what is averaged
    is still far from trained.
    """
    early = min(decay, (step + 1) / (step + 10))
    for kept, now in zip(average.parameters(), current.parameters(), strict=True):
        kept.lerp_(now, 1 - early)
