"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from genssl.config.recipe import OptimizerConfig, ScheduleConfig


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
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
    groups[1]["adapt"] = False
    return LARS(
        groups,
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        trust_coefficient=config.trust_coefficient,
        clip=config.clip,
    )


def lr_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Returns the learning rate of a step as a fraction of the peak; the convention stands in `ScheduleConfig`."""
    total, warmup = steps_per_epoch * epochs, round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
