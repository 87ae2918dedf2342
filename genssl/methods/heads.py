"""Projectors and predictors."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import nn


def mlp(
    *sizes: int,
    norm: bool = True,
    last_norm: Literal["none", "plain", "affine"] = "none",
    last_bias: bool = True,
) -> nn.Sequential:
    """Returns linear layers with batch norm and ReLU after each but the last.

    A linear layer before a batch norm has no bias: the norm would subtract it.

    Args:
        sizes: of the input, the hidden layers, and the output.
        norm: whether the hidden layers have batch norm.
        last_norm: batch norm after the last layer: none, without ("plain") or with ("affine") learnt scale and shift.
        last_bias: whether the last layer has a bias, if no norm follows it.
    """
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes[:-1]):
        layers.append(nn.Linear(size_in, size_out, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(size_out))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=last_bias and last_norm == "none"))
    if last_norm != "none":
        layers.append(nn.BatchNorm1d(sizes[-1], affine=last_norm == "affine"))
    return nn.Sequential(*layers)
