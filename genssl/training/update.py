"""One optimiser step, in the recipe's precision and micro-batches; optimisers, and the learning-rate schedule."""

from __future__ import annotations

import math
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from genssl.base.devices import stream
from genssl.base.ranks import ALONE, Ranks
from genssl.config.recipe import OptimizerConfig, ScheduleConfig, TrainConfig
from genssl.methods.base import StepOutput, Views

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Update:
    """Trains a method, which has `step(views)`, by a batch at a time; among several ranks gradients are averaged.

    Attributes:
        scaler: of fp16 gradients, which is part of a checkpoint; None for other precisions.
    """

    def __init__(
        self,
        method: Any,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self._method, self._optimizer, self._config, self._device = method, optimizer, config, device
        self._rank = ranks.rank
        self._step = step_of(method, ranks, device)
        self.scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None

    def __call__(self, views: Views, lr: float, *names: int) -> tuple[float, dict[str, float]]:
        """Takes one optimiser step by this rank's part of the batch; returns the loss and the method's metrics.

        Both are means over the micro-batches. What the method draws at random depends on `names` (run seed and step)
        and the rank alone.
        """
        seed_default_streams("update", *names, self._rank, device=self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        parts = chunks(views, self._config.accumulate)
        losses, metrics = [], defaultdict[str, float](float)
        self._optimizer.zero_grad(set_to_none=True)
        for number, part in enumerate(parts):
            with self._without_sync(last=number == len(parts) - 1):
                with self._autocast():
                    output = self._step(self._in_order(part))
                loss = output.loss if len(parts) == 1 else output.loss / len(parts)
                (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
            losses.append(output.loss.detach())
            for name, value in output.metrics.items():
                metrics[name] += value / len(parts)
        if self._config.clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self._method.parameters(), self._config.clip_grad_norm)
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        return sum(loss.item() for loss in losses) / len(losses), dict(metrics)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device.type, DTYPES[self._config.precision])

    def _without_sync(self, *, last: bool) -> AbstractContextManager[Any]:
        """Inside, gradients are only added up on this rank; they are averaged over the ranks with the last part."""
        if last or not isinstance(self._step, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self._step.no_sync()

    def _in_order(self, views: Views) -> Views:
        if not self._config.channels_last:
            return views
        return map_views(views, lambda rows: rows.to(memory_format=torch.channels_last) if rows.ndim == 4 else rows)


class _Step(nn.Module):
    """A method whose forward is its step, since it is in `forward` that DDP listens."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def forward(self, views: Views) -> StepOutput:
        output: StepOutput = self.method.step(views)
        return output


def step_of(method: Any, ranks: Ranks, device: torch.device) -> Any:
    """Returns what computes a step's loss; among several ranks it averages the gradients over them."""
    if ranks.size == 1:
        return method.step
    # Buffers need no broadcast: batch norms and queues see the global batch, so every rank has the same.
    devices = [device] if device.type == "cuda" else None
    with warnings.catch_warnings():  # newer versions of torch would call this by another name
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(_Step(method), device_ids=devices, broadcast_buffers=False)


def chunks(views: Views, count: int) -> list[Views]:
    """Cuts a batch of views into `count` equal parts, by rows."""
    if count == 1:
        return [views]
    size = len(views.pair[0]) // count
    parts = [slice(number * size, (number + 1) * size) for number in range(count)]
    return [map_views(views, operator.itemgetter(part)) for part in parts]


def map_views(views: Views, change: Callable[[torch.Tensor], torch.Tensor]) -> Views:
    """Returns the views with every tensor of images, and the weights, changed."""
    first, second = views.pair
    return Views(
        pair=(change(first), change(second)),
        generated=tuple(change(images) for images in views.generated),
        crops=tuple(change(images) for images in views.crops),
        pair_weights=None if views.pair_weights is None else change(views.pair_weights),
    )


def seed_default_streams(*names: object, device: torch.device) -> None:
    """Seeds torch's default generators, of the CPU and of `device`, by names.

    Everything of genssl draws from streams of its own; layers such as dropout do not. Seeded anew in every step, they
    too depend on the step alone, and a resumed run needs no generator's state.
    """
    seed = stream(*names).initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


# ---- Optimisers and the learning-rate schedule ----
class LARS(torch.optim.Optimizer):
    """SGD with momentum and layer-wise rates (You et al. 2017, arXiv 1708.03888), as in solo-learn.

    For a parameter w with gradient g let r = eta |w| / (|g| + wd |w|). The local rate is min(r / lr, 1) with `clip`,
    and r without; g + wd w is scaled by it before momentum. Groups with `adapt: False` (biases, normalisation) get
    plain SGD. Unlike timm's Lars the rate applies at weight decay 0 as well; where |w| or |g| is 0 it is 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
        clip: bool = True,
    ) -> None:
        rates = {"lr": lr, "eta": trust_coefficient, "clip": clip, "adapt": True}
        super().__init__(params, {"momentum": momentum, "weight_decay": weight_decay, **rates})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if group["adapt"]:
                    weight, gradient = parameter.norm(), parameter.grad.norm()
                    trust = group["eta"] * weight / (gradient + group["weight_decay"] * weight)
                    rate = (trust / group["lr"]).clamp(max=1) if group["clip"] else trust
                    local = torch.where((weight > 0) & (gradient > 0), rate, torch.ones_like(weight))
                    update = update * local
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum"], alpha=-group["lr"])
        return loss


def peak_lr(config: OptimizerConfig, batch_size: int) -> float:
    """Returns the learning rate at the top of the schedule."""
    return config.lr * batch_size / 256 if config.lr_rule == "linear" else config.lr


def build_optimizer(config: OptimizerConfig, module: nn.Module, batch_size: int) -> torch.optim.Optimizer:
    """Returns the optimiser; parameters with one dimension (biases, norms) have neither weight decay nor LARS rates."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    lr = peak_lr(config, batch_size)
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=config.weight_decay)
    rates: dict[str, Any] = {"lr": lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return torch.optim.SGD(groups, **rates)
    groups[1]["adapt"] = False
    return LARS(groups, trust_coefficient=config.trust_coefficient, clip=config.clip, **rates)


def lr_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Returns the learning rate of a step as a fraction of the peak; the convention stands in `ScheduleConfig`."""
    total, warmup = steps_per_epoch * epochs, round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
