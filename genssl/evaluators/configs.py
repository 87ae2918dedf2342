"""Settings of the evaluators. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genssl.config.base import ComponentConfig


class KNNConfig(ComponentConfig):
    """Weighted k-nearest-neighbour vote (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

    name: Literal["knn"] = "knn"
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)


class LinearProbeConfig(ComponentConfig):
    """Multinomial logistic regression on standardised frozen features; a held-out part of train chooses its penalty."""

    name: Literal["linear_probe"] = "linear_probe"
    penalties: list[float] = Field(
        [0.001, 0.01, 0.1, 1.0, 10.0], min_length=1, description="candidate inverse penalties C"
    )
    held_out: float = Field(0.2, gt=0, lt=1, description="part of train that chooses among them")
    seed: int = Field(0, ge=0)


class FewShotConfig(ComponentConfig):
    """Logistic regression on a few labelled images a class, over many draws of them."""

    name: Literal["few_shot"] = "few_shot"
    labels_per_class: int = Field(5, ge=1)
    draws: int = Field(20, ge=2)
    penalty: float = Field(1.0, gt=0, description="inverse penalty C; fixed, since nothing is left to choose it on")
    seed: int = Field(0, ge=0)
