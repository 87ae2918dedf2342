"""What a data set is to the rest of genssl."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Split = Literal["train", "test"]
RAW = "raw"


@dataclass(frozen=True)
class StoredImage:
    """An image as its data set stores it.

    Attributes:
        data: the file's bytes, or, with encoding "raw", the pixels as uint8 in [channels, height, width] order.
        encoding: "raw", or "file" for JPEG, PNG, WebP, BMP and TIFF files.
        channels, height, width: the shape of a raw image; 0 for files.
    """

    data: bytes
    encoding: Literal["raw", "file"]
    channels: int = 0
    height: int = 0
    width: int = 0

    @property
    def source_id(self) -> bytes:
        """The 16-byte name: BLAKE2b-128 of the file's bytes, or of "uint8[c,h,w]" and the raw pixels."""
        digest = hashlib.blake2b(digest_size=16)
        if self.encoding == RAW:
            digest.update(f"uint8[{self.channels},{self.height},{self.width}]".encode())
        digest.update(self.data)
        return digest.digest()


def raw_image(pixels: UInt8Array) -> StoredImage:
    """Returns an array image [C, H, W] uint8 (C is 1 or 3) in its stored form."""
    channels, height, width = pixels.shape
    return StoredImage(data=pixels.tobytes(), encoding="raw", channels=channels, height=height, width=width)


class ImageDataset(Protocol):
    """One split of a data set. Row numbers run from 0 to len - 1 and never change between runs.

    One whose images have sizes of their own has besides `pixels(row)`, which returns uint8 [3, H, W] as decoded; the
    views of a training are then cropped from the whole image, and not from the square that `image` returns. One whose
    images are files has `path(row)`, which returns where the file lies below the data set's root.

    Attributes:
        name: registry name, for provenance.
        class_names: names of the classes, or None when the images have no labels.
        image_size: side of the square images that `image` returns, in pixels.
        skipped: paths of corrupt files that `on_corrupt: skip` left out.
    """

    name: str
    class_names: list[str] | None
    image_size: int
    skipped: list[str]

    def __len__(self) -> int: ...

    def image(self, row: int) -> UInt8Array:
        """Returns the image [3, image_size, image_size] in RGB; raises DataError naming the file if it is corrupt."""
        ...

    def label(self, row: int) -> int:
        """Returns the class 0 .. len(class_names) - 1, or -1 for an unlabelled image."""
        ...

    def stored(self, row: int) -> StoredImage:
        """Returns the image as stored: what a generator conditions on, at full resolution."""
        ...

    def source_id(self, row: int) -> bytes:
        """Returns the 16-byte name of the image."""
        ...


def pixels_of(dataset: ImageDataset) -> Callable[[int], UInt8Array] | None:
    """Returns what decodes an image at its own size, if the images of the data set have sizes of their own."""
    pixels: Callable[[int], UInt8Array] | None = getattr(dataset, "pixels", None)
    return pixels


def path_of(dataset: ImageDataset, row: int) -> str | None:
    """Returns where an image's file lies below the root of its data set; None if the images are no files."""
    path: Callable[[int], str] | None = getattr(dataset, "path", None)
    return None if path is None else path(row)
