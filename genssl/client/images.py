"""Images as users have them, brought to the form in which they are sent and named. Imports no torch."""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genssl.data.base import StoredImage, UInt8Array, raw_image
from genssl.data.decode import upright
from genssl.errors import DataError
from genssl.variants.source import VariantRequest

ALLOWED = (
    "allowed: the bytes or the path of an image file, a PIL image, a uint8 array or torch tensor "
    "[3, H, W], [1, H, W], [H, W, 3], [H, W, 1] or [H, W], or a genssl StoredImage"
)

# Pixels beyond what a server takes by default (limits.max_image_bytes and max_image_pixels of the server file) are
# shrunk before they are named. The limits are these whatever the server's are, or an image would have several names.
MOST_RAW_BYTES, MOST_RAW_PIXELS = 16 * 2**20, 16_000_000
LEAST_SIDE = 768  # of what is shrunk: conditioners take squares of 224 to 518 pixels


def stored_image(image: Any, where: str = "image 0") -> StoredImage:
    """Returns an image in its stored form, which names it and is what a generator conditions on.

    Files are sent as they are, so that one image has one name whoever sends it. Pixels are sent raw; those of a PIL
    image as `data.decode.upright` brings them, which is how the server reads its file.

    Pixels of more than 16 MiB, or more than 16,000,000 of them, such as a photo of 4000 x 3000, are shrunk first. What
    is left is the source, named by its own pixels: the same each time, and another source than the file. Pillow's
    `reduce` takes the mean of each block of n x n pixels; what no block holds is cut off at the edges. n is the largest
    that leaves the short side 768 pixels or more, or the smallest that brings the image within those limits if that is
    larger. A PIL image that large which has been opened and not yet read is sent as the JPEG file that it is, if that
    is within the limits. To send large pixels whole, give a StoredImage (`genssl.data.base.raw_image`), to
    a server that takes it.

    Args:
        image: see the message of the TypeError; an array [3, H, 3] is taken as [channels, height, width].
        where: what error messages call it.

    Raises:
        TypeError: if it is none of these, or an array that is not uint8.
        ValueError: if the array has another shape.
        DataError: if its file cannot be read, or it is a PIL image of 32-bit numbers.
    """
    if isinstance(image, StoredImage):
        return image
    if isinstance(image, bytes | bytearray | memoryview):
        return StoredImage(data=bytes(image), encoding="file")
    if isinstance(image, str | os.PathLike):
        try:
            return StoredImage(data=Path(image).expanduser().read_bytes(), encoding="file")
        except OSError as error:
            raise DataError(f"{where}: {os.fspath(image)} cannot be read: {error.strerror}") from None
    if isinstance(image, Image.Image):
        if _is_large(*image.size, 1 if image.mode == "L" else 3) and (file := _unread_file(image)) is not None:
            return file
        return _raw(array_pixels(np.asarray(read_picture(image, where)), where))
    return _raw(array_pixels(image, where))


def read_picture(image: Image.Image, where: str) -> Image.Image:
    """Returns a picture as `data.decode.upright` brings it, whose DataError then begins with `where`."""
    try:
        return upright(image)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def array_pixels(image: Any, where: str) -> UInt8Array:
    """Returns an array or torch tensor, wherever it is, as uint8 [1 or 3, H, W]; raises as `stored_image`."""
    if not hasattr(image, "dtype") or not hasattr(image, "shape"):
        raise TypeError(f"{where} is a {type(image).__name__}; {ALLOWED}")
    if (dtype := str(image.dtype).removeprefix("torch.")) != "uint8":
        if dtype == "uint16":
            advice = "for values in 0..65535, (x / 257).round()"
        else:
            advice = "for values in 0..1, (x * 255).round()"
        raise TypeError(
            f"{where} has the dtype {dtype}; uint8 in 0..255 is wanted: {advice} and then convert to uint8; undo any "
            "normalisation first. In GenerativeViews, take the transforms off the data set and give them as `transform`"
        )
    pixels = image.detach().cpu().numpy() if hasattr(image, "detach") else np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and pixels.shape[0] not in (1, 3) and pixels.shape[2] in (1, 3):
        pixels = pixels.transpose(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"{where} has the shape {list(pixels.shape)}; {ALLOWED}")
    return pixels


def _raw(pixels: UInt8Array) -> StoredImage:
    channels, height, width = pixels.shape
    return raw_image(np.ascontiguousarray(_shrunk(pixels) if _is_large(width, height, channels) else pixels))


def _is_large(width: int, height: int, channels: int) -> bool:
    return width * height > MOST_RAW_PIXELS or width * height * channels > MOST_RAW_BYTES


def _shrunk(pixels: UInt8Array) -> UInt8Array:
    """Returns pixels uint8 [C, H, W] shrunk by a whole factor, by the rule of `stored_image`."""
    channels, height, width = pixels.shape
    factor = max(2, min(height, width) // LEAST_SIDE)
    while _is_large(width // factor, height // factor, channels):
        factor += 1
    left, top = width % factor // 2, height % factor // 2
    box = (left, top, left + width // factor * factor, top + height // factor * factor)
    whole = Image.fromarray(np.ascontiguousarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)))
    reduced = np.asarray(whole.reduce(factor, box))
    return reduced[None] if channels == 1 else reduced.transpose(2, 0, 1)


def _unread_file(image: Image.Image) -> StoredImage | None:
    """Returns the JPEG file of a PIL image whose pixels nobody has read, let alone changed; None if there is none."""
    source = getattr(image, "fp", None)
    if source is None or image.format != "JPEG":
        return None
    position = source.tell()
    source.seek(0)
    data = source.read(MOST_RAW_BYTES + 1)
    source.seek(position)
    if len(data) > MOST_RAW_BYTES or image.width * image.height > MOST_RAW_PIXELS:
        return None
    with Image.open(io.BytesIO(data)) as again:
        same = (again.format, again.mode, again.size) == (image.format, image.mode, image.size)  # not so after `draft`
    return StoredImage(data=data, encoding="file") if same else None


@dataclass
class Wanted:
    """What a call for variants wants, each different variant once.

    Attributes:
        images: one of each different source, in order of first appearance.
        requests, seeds: the different variants, `row` counting in `images`, and their seeds; None leaves one to the
            server.
        positions, source_ids, names: of each variant of the call, its position in `requests`, 16 bytes, and what
            messages call its image.
    """

    images: list[StoredImage] = field(default_factory=list)
    requests: list[VariantRequest] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    source_ids: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def name(self, item: int) -> str:
        """Returns what the caller knows the image of `requests[item]` by: several names if it was given repeatedly."""
        found = [name for name, position in zip(self.names, self.positions, strict=True) if position == item]
        found = list(dict.fromkeys(found))
        return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _numbers(values: int | Sequence[int] | None, count: int, name: str) -> list[int] | list[None]:
    if values is None:
        return [None] * count
    try:
        numbers = [operator.index(values)] * count  # type: ignore[arg-type]
    except TypeError:
        numbers = [operator.index(value) for value in values]  # type: ignore[union-attr]
    if len(numbers) != count:
        raise ValueError(f"there are {count} images but {len(numbers)} {name}; give one for each image, or one for all")
    if wrong := [number for number in numbers if not 0 <= number < 2**64]:
        raise ValueError(f"{name}: {wrong[0]} is not allowed; 0 <= number < 2**64")
    return numbers


def wanted_variants(
    images: Sequence[Any],
    indices: int | Sequence[int],
    seeds: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Wanted:
    """Reads the arguments of a call for variants; an image asked for under one index twice is wanted once.

    `images`, `indices` and `seeds` are those of `VariantClient.variants`; `names` are what error messages call each
    image, by default "image 0" and so on. Raises TypeError, ValueError or DataError as `stored_image`, or if the
    numbers do not fit.
    """
    single = isinstance(images, str | bytes | os.PathLike | Image.Image | StoredImage)
    if single or getattr(images, "ndim", 4) != 4:
        raise ValueError("`images` is one image; put it into a list: a sequence of images is expected")
    names = [f"image {position}" for position in range(len(images))] if names is None else list(names)
    stored = [stored_image(image, name) for image, name in zip(images, names, strict=True)]
    wanted = Wanted(source_ids=[image.source_id for image in stored], names=names)
    rows: dict[bytes, int] = {}
    known: dict[tuple[bytes, int, int | None], int] = {}
    numbers = _numbers(indices, len(stored), "indices")
    for image, source_id, index, seed in zip(
        stored, wanted.source_ids, numbers, _numbers(seeds, len(stored), "seeds"), strict=True
    ):
        if index is None:
            raise TypeError("`indices` is None; give the number of the variant wanted, or one for each image")
        if source_id not in rows:
            rows[source_id] = len(rows)
            wanted.images.append(image)
        key = (source_id, index, seed)
        if key not in known:
            known[key] = len(known)
            wanted.requests.append(VariantRequest(rows[source_id], source_id, index))
            wanted.seeds.append(seed)
        wanted.positions.append(known[key])
    return wanted
