"""The `conditioner` section of a generator's recipe: the frozen self-supervised encoder whose features it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from genssl.config.augmentation import AugmentationConfig
from genssl.config.base import ComponentConfig, Kind, Section


class ConditionerConfig(Section):
    """Either the encoder of a finished run, or a backbone that is trained by SimCLR on the images first (no labels)."""

    run: Path | None = Field(
        None, description="a run directory whose encoder.safetensors is copied; nothing is trained then"
    )
    backbone: Annotated[SerializeAsAny[ComponentConfig] | None, Kind("backbones")] = Field(
        None, validate_default=True, description="trained by SimCLR with the settings below; not together with `run`"
    )
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    temperature: float = Field(0.2, gt=0)
    projector_hidden_dim: int = Field(256, ge=1)
    projector_output_dim: int = Field(64, ge=1)
    augmentation: AugmentationConfig = AugmentationConfig()

    @field_validator("backbone")
    @classmethod
    def _one_of_both(cls, value: ComponentConfig | None, info: ValidationInfo) -> ComponentConfig | None:
        if "run" in info.data and (value is None) == (info.data["run"] is None):
            raise ValueError("the encoder comes from a `run` or is a `backbone` trained here; give one of them")
        return value
