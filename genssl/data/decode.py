"""Decodes images from users' folders and from the wire: Pillow, an allow-list of formats, caps before decoding.

torchvision.io.decode_image is avoided: version 0.29.2 crashes the process on some corrupt PNGs and follows a small JPEG
header that claims 65500 x 65500 pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genssl.data.base import RAW, StoredImage, UInt8Array
from genssl.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
ROWS_AT_ONCE = 256


class TooManyPixelsError(DataError):
    """An image of more pixels than the limit that was given."""


def decode(stored: StoredImage, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Returns the pixels of a stored image as RGB uint8 [3, H, W], upright as EXIF says.

    Raises:
        DataError: if the image is too large, truncated, of a foreign format, or raw with a wrong shape.
    """
    if len(stored.data) > max_bytes:
        raise DataError(f"the image has {len(stored.data):,} bytes; the limit is {max_bytes:,}")
    if stored.encoding == RAW:
        return _raw_pixels(stored, max_pixels)
    with _opened(stored, max_pixels) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        upright = _to_rgb(image)
    return np.ascontiguousarray(np.asarray(upright).transpose(2, 0, 1))


def count_pixels(stored: StoredImage, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> int:
    """Returns how many pixels an image says it has; reads its header alone.

    Raises:
        DataError: if the image is too large, of a foreign format, or raw with a wrong shape.
    """
    if len(stored.data) > max_bytes:
        raise DataError(f"the image has {len(stored.data):,} bytes; the limit is {max_bytes:,}")
    if stored.encoding == RAW:
        pixels: int = _raw_pixels(stored, max_pixels)[0].size
        return pixels
    with _opened(stored, max_pixels) as image:
        width, height = image.size
    return int(width) * int(height)


@contextmanager
def _opened(stored: StoredImage, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image file whose header says that it has no more pixels; whatever fails is a DataError."""
    try:
        with Image.open(io.BytesIO(stored.data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooManyPixelsError(f"the image has {width} x {height} pixels; the limit is {max_pixels:,} in all")
            yield image
    except UnidentifiedImageError:
        raise DataError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which it checks before ours
        raise TooManyPixelsError(f"the image has far more pixels than the limit of {max_pixels:,} in all") from None
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, EOFError, ...
        raise DataError(f"the image is corrupt: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 bits and more: Pillow's own conversion would clip at 255
        grey = np.empty((image.height, image.width), np.uint8)
        for top in range(0, image.height, ROWS_AT_ONCE):  # as float64 all of it would take 16 bytes a pixel
            rows = image.crop((0, top, image.width, min(top + ROWS_AT_ONCE, image.height)))
            grey[top : top + rows.height] = (np.asarray(rows, np.float64).clip(0, 65535) / 257).round()
        return Image.fromarray(grey).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _raw_pixels(stored: StoredImage, max_pixels: int) -> UInt8Array:
    shape = (stored.channels, stored.height, stored.width)
    if stored.channels not in (1, 3) or min(shape) < 1 or np.prod(shape, dtype=np.int64) != len(stored.data):
        raise DataError(
            f"a raw image of shape {shape} cannot have {len(stored.data)} bytes; it is uint8 [1 or 3, height, width]"
        )
    if stored.height * stored.width > max_pixels:
        raise TooManyPixelsError(
            f"the image has {stored.width} x {stored.height} pixels; the limit is {max_pixels:,} in all"
        )
    pixels = np.frombuffer(stored.data, np.uint8).reshape(shape)
    return np.repeat(pixels, 3, axis=0) if stored.channels == 1 else pixels


def resize_and_crop(pixels: UInt8Array, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> UInt8Array:
    """Resizes the centre square to `size` pixels (antialiased).

    Args:
        pixels: uint8 [3, H, W].
        size: side of the result in pixels.
        resample: Pillow's filter.

    Returns:
        uint8 [3, size, size]; the input itself if it has that shape already.
    """
    _, height, width = pixels.shape
    if (height, width) == (size, size):
        return pixels
    # The square is cut out before it is resized (the other order differs at the outermost pixels only): the long side
    # of a 60,000,000 x 1 image would otherwise grow with the short one.
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    square = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
