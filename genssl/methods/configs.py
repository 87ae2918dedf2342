"""Settings of the methods. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genssl.config.base import ComponentConfig


class SimCLRConfig(ComponentConfig):
    """SimCLR; the projector is a two-layer MLP (Chen et al. 2020, section 4.2)."""

    name: Literal["simclr"] = "simclr"
    projector_hidden_dim: int = Field(2048, ge=1)
    projector_output_dim: int = Field(128, ge=1)
    temperature: float = Field(0.2, gt=0)
