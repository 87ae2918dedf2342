"""Many linear classifiers trained at once on the same batches, one for each learning rate and weight decay."""

from __future__ import annotations

import math
from typing import Literal

import torch

from genssl.base.devices import stream

MOMENTUM = 0.9
CHUNK = 2**16  # features at a time
CELLS = 2**24  # logits in memory at a time when many images are classified


class LinearHeads:
    """H softmax classifiers of standardised features, which see the same batches and differ in how they learn.

    The gradient of the cross-entropy is in closed form, so a step is two matrix products, whatever H is. The learning
    rates fall to 0 by a cosine. Weights start at a normal of deviation 0.01, equal in all heads; biases at 0.

    The rules, with g the gradient plus weight decay times w (none on biases), and momentum v:

    - sgd: v = 0.9 v + g; w = w - lr v.
    - lars (You et al. 2017, arXiv 1708.03888): g is scaled by trust |w| / (|gradient| + decay |w|) before the momentum,
      for the weights of one head as one layer; biases as by sgd. At weight decay 0 as well, unlike timm's; unlike
      genssl's LARS of the training it is not clipped to plain SGD, so lr means relative change.

    Args:
        dim: D of the features.
        classes: C.
        rates: learning rate of each head.
        decays: weight decay of each head.
        rule: "sgd" or "lars".
        trust: the trust coefficient of lars.
        mean, deviation: [D] that features are standardised by.
        steps: how many there will be.
        seed: of the first weights.
        device: where the heads are.
    """

    def __init__(
        self,
        *,
        dim: int,
        classes: int,
        rates: list[float],
        decays: list[float],
        rule: Literal["sgd", "lars"],
        trust: float,
        mean: torch.Tensor,
        deviation: torch.Tensor,
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._rule, self._trust, self._steps, self._done, self.device = rule, trust, steps, 0, device
        self._rates = torch.tensor(rates, device=device)[:, None]
        self._decays = torch.tensor(decays, device=device)[:, None, None]
        first = torch.randn((dim, classes), generator=stream("linear_heads", seed)) * 0.01
        self.weights = first.to(device).expand(len(rates), dim, classes).clone()
        self.biases = torch.zeros((len(rates), classes), device=device)
        self._momenta = torch.zeros_like(self.weights), torch.zeros_like(self.biases)
        self._mean, self._deviation = mean.to(device), deviation.to(device)

    @torch.no_grad()
    def step(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes one step of every head on a batch of features float [B, D] with labels int64 [B]."""
        x, labels = self._standardised(features), labels.to(self.device)
        errors = self._logits(x).softmax(dim=2)
        errors[:, torch.arange(len(x), device=self.device), labels] -= 1
        errors /= len(x)
        gradient = torch.einsum("bd,hbc->hdc", x, errors)
        update = gradient + self._decays * self.weights
        if self._rule == "lars":
            norm = _norms(self.weights)
            local = self._trust * norm / (_norms(gradient) + self._decays * norm)
            update *= torch.where(local.isfinite() & (local > 0), local, 1.0)
        rates = self._rates * 0.5 * (1 + math.cos(math.pi * self._done / self._steps))
        for parameter, momentum, change, rate in (
            (self.weights, self._momenta[0], update, rates[:, :, None]),
            (self.biases, self._momenta[1], errors.sum(dim=1), rates),
        ):
            momentum.mul_(MOMENTUM).add_(change)
            parameter.sub_(rate * momentum)
        self._done += 1

    @torch.no_grad()
    def accuracies(self, features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor | None = None) -> list[float]:
        """Returns the accuracy of every head on features float [N, D] with labels int64 [N], or on some rows of them.

        Memory is bounded by chunks.
        """
        rows = torch.arange(len(features)) if rows is None else rows
        heads, _, classes = self.weights.shape
        right = torch.zeros(heads, dtype=torch.long, device=self.device)
        for part in torch.split(rows, max(1, CELLS // (heads * classes))):
            predicted = self._logits(self._standardised(features[part])).argmax(dim=2)
            right += (predicted == labels[part].to(self.device)).sum(dim=1)
        return [int(count) / len(rows) for count in right]

    def _standardised(self, features: torch.Tensor) -> torch.Tensor:
        return (features.to(self.device) - self._mean) / self._deviation

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.einsum("bd,hdc->hbc", x, self.weights) + self.biases[:, None]
        return logits


def standardisation(features: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and deviation float [D] of some rows of features [N, D]; of a constant dimension the latter is 1.

    Memory is bounded by chunks.
    """
    parts = torch.split(rows, CHUNK)
    mean = sum((features[part].double().sum(dim=0) for part in parts), torch.zeros(())) / len(rows)
    squares = sum(((features[part].double() - mean).square().sum(dim=0) for part in parts), torch.zeros(()))
    deviation = (squares / len(rows)).sqrt()
    # The deviation of a constant is rounding noise, and must not be scaled up to 1.
    constant = deviation <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.float(), torch.where(constant, 1.0, deviation).float()


def _norms(weights: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(weights, dim=(1, 2), keepdim=True)
    return norms
