"""Settings of what draws on a bank of images: retrieval, and interpolation between neighbours. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator

from genssl.config.base import ComponentConfig, Section
from genssl.config.validate import require_component
from genssl.errors import UserError
from genssl.registry import BACKBONES, DATASETS


def _images(value: Any) -> Any:
    """Reads a data set's block, its name alone, or the path of a folder of images."""
    if isinstance(value, Path) or (isinstance(value, str) and value not in DATASETS.names()):
        value = {"name": "folder", "root": value, "labels": "none", "image_size": 224}
    return _component(DATASETS, value, "a data set's block {name: ...}, or the path of a folder of images")


def _encoder(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return _component(BACKBONES, value, "a backbone's block {name: ...}")


def _component(registry: Any, value: Any, expected: str) -> ComponentConfig:
    if isinstance(value, ComponentConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"{expected} is expected")
    try:
        model = registry.config(value["name"])
        require_component(registry.kind, value["name"], model)
        config: ComponentConfig = model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
    except UserError as error:
        raise ValueError(str(error)) from None
    return config


Images = Annotated[SerializeAsAny[ComponentConfig], BeforeValidator(_images)]
Encoder = Annotated[str | SerializeAsAny[ComponentConfig], BeforeValidator(_encoder)]


class BankConfig(Section):
    """Images whose embeddings are searched for a source's neighbours; the training split of a data set."""

    images: Images = Field(description="a data set's block, or the path of a folder of images")
    embeddings: Path | None = Field(
        None, description="a .safetensors file that keeps the embeddings; made where it is absent"
    )

    @field_validator("embeddings")
    @classmethod
    def _suffix(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix != ".safetensors":
            raise ValueError("the file's name ends in .safetensors")
        return value


class InterpolationConfig(BankConfig):
    """Spherical interpolation of a source's embedding with one of its neighbours' (Gen-SIS, arXiv 2412.01672)."""

    neighbours: int = Field(5, ge=1, le=1000, description="the nearest images, of which each variant draws one")
    amount: float | tuple[float, float] = Field(
        (0.0, 0.5), description="0: the source, 1: the neighbour; or a range, of which every variant draws its own"
    )

    @field_validator("amount")
    @classmethod
    def _fits(cls, value: float | tuple[float, float]) -> float | tuple[float, float]:
        low, high = (value, value) if isinstance(value, float) else value
        if not 0 <= low <= high <= 1:
            raise ValueError("a number in 0..1 is expected, or a range [low, high] within it")
        return value
