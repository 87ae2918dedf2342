"""How an image encoder of CLIP's kind is shown a source: which square of it, resized by what, and normalised.

`clip`, as the stock pipelines do (transformers' CLIPImageProcessor): the image is resized until its shorter side has
the size that the model's config names, and the centre is cut out of the result; equal to it to 1 grey level.
`paper`, as the script of arXiv 2403.05966 does before it calls the pipeline: the centre square is cut out first, and
then resized, bilinear.
`square`, as genssl prepares the images that it trains on, and once did for all models: the centre square is cut out,
to half a pixel, and resized, bicubic. Of a square source, `clip` and `square` make the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from genssl.data.base import UInt8Array
from genssl.data.decode import resize_and_crop
from genssl.errors import GeneratorError
from genssl.generators.models import read_json

Rule = Literal["clip", "paper", "square"]
# Part of the names of variants and of kept embeddings. That of `square` is what there was before there was a choice.
VERSIONS: dict[str, str] = {"clip": "clip/2", "paper": "paper/1", "square": "clip/1"}
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
REACH = 4  # filters of Pillow look less far, in pixels of the input or of the result, whichever are larger
PRESENT = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")  # steps that are always taken


@dataclass(frozen=True)
class Preprocessing:
    """Brings sources to an image encoder's input.

    Attributes:
        size: side of that input in pixels.
        mean, std: of the channels, of images in 0..1.
        rule: see the module.
        resize: of rule `clip`: pixels of the shorter side before the centre is cut out, or (height, width).
        resample: of rule `clip`: Pillow's filter.
    """

    size: int
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    rule: Rule = "square"
    resize: int | tuple[int, int] = 0
    resample: Image.Resampling = BICUBIC

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings uint8 [3, H, W] of any size to uint8 [3, size, size]."""
        if self.rule == "clip":
            return resize_then_crop(image, self.resize or self.size, self.size, self.resample)
        if self.rule == "paper":
            return crop_then_resize(image, self.size)
        return resize_and_crop(image, self.size)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Brings uint8 [B, 3, S, S] (0..255) to the encoder's float32 input, by its mean and standard deviation."""
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        normalised: torch.Tensor = (images.float() / 255 - mean) / std
        return normalised

    def facts(self) -> list[str]:
        """Returns what the name of a generator owes to the rule; nothing of `square`, which came first."""
        return [] if self.rule == "square" else [f"preprocess={VERSIONS[self.rule]}"]

    def encoder_facts(self) -> list[str]:
        """Returns what the name of an image encoder owes to all of this."""
        told = {"size": self.size, "mean": list(self.mean), "std": list(self.std)}
        if self.rule == "clip":
            told |= {"resize": self.resize, "resample": int(self.resample)}
        return [VERSIONS[self.rule], json.dumps(told, sort_keys=True)]


def read_preprocessing(folder: Path, subfolder: str = "feature_extractor", rule: Rule | None = None) -> Preprocessing:
    """Reads how an image encoder wants images from `preprocessor_config.json` in a pipeline's sub-folder.

    Without a rule, it is `square` for a model that genssl trained, as its card says, and `clip` for any other.

    Raises:
        GeneratorError: if the config is missing, or asks for what is not done here.
    """
    path = folder / subfolder / "preprocessor_config.json"
    config = read_json(path)
    if "image_mean" not in config or "image_std" not in config:
        raise GeneratorError(f"{path}: has no image_mean or no image_std; the model folder is incomplete, get it again")
    crop = config.get("crop_size", 224)
    height, width = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
    mean, std = (np.asarray(config[key], dtype=np.float32).tolist() for key in ("image_mean", "image_std"))
    card = folder / "card.json"
    if rule is None:
        rule = "square" if card.exists() and str(read_json(card).get("trained_by", "")).startswith("genssl") else "clip"
    if rule != "clip":
        return Preprocessing(int(height or 0), mean, std, rule)
    for step in PRESENT:
        if config.get(step, True) is not True:
            raise _refused(path, step, config[step], "true")
    if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise _refused(path, "rescale_factor", config["rescale_factor"], "1/255")
    size = config.get("size", 224)
    match size:
        case int() | {"shortest_edge": int()} if not isinstance(size, dict) or len(size) == 1:
            resize: int | tuple[int, int] = size["shortest_edge"] if isinstance(size, dict) else size
        case {"height": int(tall), "width": int(wide)} if len(size) == 2:
            resize = (tall, wide)
        case _:
            raise _refused(path, "size", size, "a number, {shortest_edge: ...} or {height: ..., width: ...}")
    least = resize if isinstance(resize, int) else min(resize)
    if not isinstance(height, int) or height != width or not 1 <= height <= least:
        raise _refused(path, "crop_size", crop, f"a square of at most {least} pixels, as `size` has")
    resample = config.get("resample", int(BICUBIC))
    if resample not in list(Image.Resampling):
        raise _refused(path, "resample", resample, ", ".join(f"{one.value} ({one.name})" for one in Image.Resampling))
    return Preprocessing(height, mean, std, rule, resize, Image.Resampling(resample))


def _refused(path: Path, field: str, found: object, allowed: str) -> GeneratorError:
    return GeneratorError(
        f"{path}: {field} is {found!r}, which is not done here; allowed: {allowed}. Change it in a copy of the folder, "
        "and check that the images are still what you expect"
    )


def resize_then_crop(
    pixels: UInt8Array, resize: int | tuple[int, int], crop: int, resample: Image.Resampling = BICUBIC
) -> UInt8Array:
    """Resizes an image and cuts the centre out of the result, as transformers' and torchvision's transforms do.

    What is cut off is not made: the long side of a 60,000,000 x 1 image would grow with the short one.

    Args:
        pixels: uint8 [3, H, W].
        resize: pixels of the shorter side, the longer one keeping the proportion, rounded down; or (height, width).
        crop: side of the result uint8 [3, crop, crop], at most that of the resized image.
        resample: Pillow's filter.
    """
    _, height, width = pixels.shape
    if isinstance(resize, tuple):
        tall, wide = resize
    elif width <= height:
        tall, wide = int(resize * height / width), resize
    else:
        tall, wide = resize, int(resize * width / height)
    if (height, width) == (tall, wide) == (crop, crop):
        return pixels
    (top, bottom), (above, below) = _window(height, tall, crop)
    (left, right), (before, after) = _window(width, wide, crop)
    image = Image.fromarray(pixels[:, above:below, before:after].transpose(1, 2, 0))
    # Columns first, as the libraries do: between the two passes values are clipped to 0..255, so the order shows.
    image = image.resize((crop, image.height), resample, box=(left - before, 0, right - before, image.height))
    image = image.resize((crop, crop), resample, box=(0, top - above, crop, bottom - above))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _window(length: int, resized: int, crop: int) -> tuple[tuple[float, float], tuple[int, int]]:
    """Returns of one axis where the centre lies in the input, and which of the input's pixels it depends on."""
    scale, start = length / resized, (resized - crop) // 2
    low, high = start * scale, min((start + crop) * scale, float(length))
    reach = REACH * max(scale, 1.0)
    return (low, high), (max(0, math.floor(low - reach)), min(length, math.ceil(high + reach)))


def crop_then_resize(pixels: UInt8Array, size: int) -> UInt8Array:
    """Cuts the centre square out of uint8 [3, H, W], to a whole pixel, and resizes it to uint8 [3, size, size].

    Bilinear and antialiased, as torchvision's CenterCrop and Resize do.
    """
    _, height, width = pixels.shape
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(pixels[:, top : top + side, left : left + side].transpose(1, 2, 0))
    return np.ascontiguousarray(np.asarray(square.resize((size, size), BILINEAR)).transpose(2, 0, 1))
