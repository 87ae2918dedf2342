"""Runs the evaluators of a recipe on a trained encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from genssl.base.ranks import ALONE, Ranks
from genssl.config.base import ComponentConfig
from genssl.data.load import labels_note
from genssl.errors import NoLabelsError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.registry import EVALUATORS


def check(configs: Sequence[ComponentConfig], data: EvaluationData) -> None:
    """Raises DataError if one of the evaluators cannot judge on this data; better before the training than after it."""
    for config in configs:
        EVALUATORS.get(config.name)(config).check(data)


def able(configs: Sequence[ComponentConfig], data: EvaluationData) -> tuple[list[ComponentConfig], str | None]:
    """Returns the evaluators that can judge on this data, and what to say of those that are left out.

    Those that need labels are left out on images whose data set was to look for labels by itself and found none;
    wherever else one cannot judge, that is the user's to know.

    Raises:
        DataError: if one of the others cannot judge.
    """
    kept, left_out = [], []
    for config in configs:
        try:
            check([config], data)
            kept.append(config)
        except NoLabelsError:
            if labels_note(data.train) is None:
                raise
            left_out.append(config.name)
    return kept, f"left out, since they need labels: {', '.join(left_out)}" if left_out else None


def divided(configs: Sequence[ComponentConfig], ranks: Ranks) -> tuple[list[ComponentConfig], list[ComponentConfig]]:
    """Returns the evaluators that all ranks run together, and those that the first one runs alone."""
    together = [
        config for config in configs if ranks.size > 1 and getattr(EVALUATORS.get(config.name), "is_shared", False)
    ]
    return together, [config for config in configs if config not in together]


def evaluate(
    configs: Sequence[ComponentConfig],
    module: nn.Module,
    data: EvaluationData,
    device: torch.device,
    report: Callable[[str], None] = lambda name: None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Returns metrics ("knn/top1": value) and protocols ("knn": facts).

    The module is afterwards as it was before, its modes and what of it is trained included.

    Args:
        configs: of the evaluators.
        module: has `encode`; see FrozenEncoder.
        data: to judge on.
        device: where the module is.
        report: is told the name of each evaluator before it runs.
        ranks: that all call this with the same evaluators and copies of the module, and get the same result.

    Raises:
        DataError: if an evaluator cannot work with this data set.
    """
    metrics, protocols = {}, {}
    with _unchanged(module):
        encoder = FrozenEncoder(module, device, ranks)
        for config in configs:
            report(config.name)
            evaluator = EVALUATORS.get(config.name)(config)
            for name, value in evaluator.run(encoder, data):
                metrics[f"{config.name}/{name}"] = value
            protocols[config.name] = evaluator.protocol
    return metrics, protocols


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Puts modes and `requires_grad` back, and asserts that weights and statistics have not changed inside."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [(part, part.training) for part in module.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
        changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
        assert not changed, f"an evaluator changed the frozen encoder: {changed}"
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
