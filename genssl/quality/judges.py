"""What variants are judged by: an encoder that the generator has not seen images with, or plain pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genssl.config.encoder import parse_encoder
from genssl.data.base import ImageDataset
from genssl.encoders.load import load_encoder, told_of

PIXELS = "pixels"
PIXELS_SIDE = 32  # larger images are shrunk to this side
LOOKED_AT = 64  # images, which tell whether a data set is grey


@dataclass(frozen=True)
class Judge:
    """A frozen encoder: `module.encode(float [B, 3, S, S] in [0, 1]) -> float [B, D]`."""

    module: nn.Module
    name: str  # as it was asked for
    device: torch.device
    # The mean of the train images is taken out before cosines: raw pixels are all positive, and cosines all near 1.
    centred: bool
    facts: dict[str, Any]  # what it is, for the protocol
    encoder: str = PIXELS  # its name without what else a block says of it
    told: str | None = None  # what was concluded from a checkpoint or assumed, for people


def load_judge(name: str, train: ImageDataset, device: torch.device) -> Judge:
    """Loads "pixels", or whatever `genssl.encoders.load.load_encoder` takes."""
    if name == PIXELS:
        side = min(train.image_size, PIXELS_SIDE)
        looked_at = [train.image(row) for row in range(min(len(train), LOOKED_AT))]
        grey = all((image == image[:1]).all() for image in looked_at)
        facts = {"name": PIXELS, "side": side, "channels": 1 if grey else 3}
        return Judge(Pixels(side, grey=grey), name, device, True, facts)
    loaded = load_encoder(name, device)
    module, facts = _Sized(loaded.module, loaded.image_size), {"name": name, **loaded.source}
    return Judge(module, name, device, False, facts, parse_encoder(name).encoder, told_of(loaded))


class Pixels(nn.Module):
    """Pixels of images shrunk to a side as features, scaled so that distances of grey images are those of one channel.

    With `grey` they are means of the channels, [B, side²] and not [B, 3 side²].
    """

    def __init__(self, side: int, *, grey: bool) -> None:
        super().__init__()
        self._side, self._grey = side, grey

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns float [B, D] of images float [B, 3, S, S] in [0, 1]."""
        images = _of_side(images, self._side)
        return images.mean(dim=1).flatten(1) if self._grey else images.flatten(1) / 3**0.5


class _Sized(nn.Module):
    """An encoder that sees images of the size it was made for."""

    def __init__(self, module: nn.Module, side: int | None) -> None:
        super().__init__()
        self._module, self._side = module, side

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._module.encode(  # type: ignore[operator]
            images if self._side is None else _of_side(images, self._side)
        )
        return features


def _of_side(images: torch.Tensor, side: int) -> torch.Tensor:
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
