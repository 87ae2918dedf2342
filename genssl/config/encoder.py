"""How an encoder is named: by NAME alone, or by a block that says what the shapes of a checkpoint's tensors cannot."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny

from genssl.config.base import ComponentConfig, Kind, Section
from genssl.config.documents.document import parse_document
from genssl.config.validate import validate

Normalization = Literal["imagenet", "inception", "cifar10", "cifar100", "none"]
NORMALIZATIONS: tuple[Normalization, ...] = ("imagenet", "inception", "cifar10", "cifar100", "none")


class EncoderConfig(Section):
    """An encoder, and for a checkpoint whatever is known better than its shapes tell it."""

    encoder: str = Field(min_length=1, description="a run directory, a file, or a name such as torchvision/resnet18")
    backbone: Annotated[SerializeAsAny[ComponentConfig] | None, Kind("backbones")] = Field(
        None, description="the network; by default what the shapes of the tensors tell"
    )
    prefix: str | None = Field(
        None,
        min_length=1,
        description="the beginning of the names of the wanted network's tensors, such as student; by default averaged "
        "weights and DINO's teacher go first, and momentum networks last",
    )
    heads: int | None = Field(None, ge=1, description="of a ViT's attention; by default one for 64 channels")
    stem_padding: Literal[1, 2] | None = Field(
        None, description="of a ResNet's stem for small images; solo-learn's is 2, that of others 1"
    )
    normalize: Normalization | None = Field(
        None,
        description="statistics of the images that it was trained on; inception: 0.5 for all, as many ViTs of timm",
    )


def parse_encoder(text: str) -> EncoderConfig:
    """Reads NAME, or `{encoder: NAME, prefix: student, heads: 12}`.

    Raises:
        ConfigError: for a block that is no YAML, or has unknown keys or wrong values.
    """
    if not text.lstrip().startswith("{"):
        return EncoderConfig(encoder=text)
    document = parse_document(text, "encoder")
    document.places = dict.fromkeys(document.places, f"encoder {text!r}")  # a line number would say nothing
    return validate(EncoderConfig, document)


def encoder_block(name: str, **settings: Any) -> str:
    """Returns the block of an encoder as a shell takes it, such as `'{encoder: x.pth, heads: 12}'`.

    Args:
        name: of the encoder.
        settings: of `EncoderConfig`; text is written as it is, such as "{name: resnet18}".
    """
    plain = name if re.fullmatch(r"[\w./~+-]*[a-zA-Z/][\w./~+-]*", name) else json.dumps(name)
    inner = ", ".join([f"encoder: {plain}", *(f"{key}: {value}" for key, value in settings.items())])
    return "'{" + inner.replace("'", "'\\''") + "}'"
