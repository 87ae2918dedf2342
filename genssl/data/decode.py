"""Reads images from users' folders and from the wire: Pillow, an allow-list of formats, caps before decoding.

A picture that somebody else has opened is brought to RGB by the same rule as its file (`upright`).

torchvision.io.decode_image is avoided: with files that are refused here, version 0.29.2 crashed the process or took 21
GB of memory. Decoders of TIFF, too, take far more memory than the pixels of some files (see `check_tiff`).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genssl.data.base import RAW, StoredImage, UInt8Array
from genssl.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000
ROWS_AT_ONCE = 256
ORIENTATION, UPRIGHT = 0x0112, 1  # of EXIF
# Of TIFF: byte order and whether offsets have 64 bits, bytes of a tag's types, formats of those that are numbers, tags.
TIFF_HEADERS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
TILE_WIDTH, TILE_HEIGHT, PARTS = 322, 323, (273, 324)  # parts are strips or tiles
MOST_PARTS = 100_000


class TooManyPixelsError(DataError):
    """An image of more pixels than the limit that was given."""


def decode(stored: StoredImage, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Returns the pixels of a stored image as RGB uint8 [3, H, W], as `upright` brings them; of a TIFF the first page.

    Raises:
        DataError: if the image is too large, truncated, of a foreign format, of 32-bit numbers, or raw with a wrong
            shape.
    """
    _check_bytes(stored, max_bytes)
    if stored.encoding == RAW:
        return _raw_pixels(stored, max_pixels)
    with _opened(stored, max_pixels) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # by `upright` there would be two of it
        rgb = upright(image).convert("RGB")
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def count_pixels(stored: StoredImage, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> int:
    """Returns how many pixels an image says it has; reads its header alone, and raises DataError as `decode` does."""
    _check_bytes(stored, max_bytes)
    if stored.encoding == RAW:
        pixels: int = _raw_pixels(stored, max_pixels)[0].size
        return pixels
    with _opened(stored, max_pixels) as image:
        width, height = image.size
    return int(width) * int(height)


def _check_bytes(stored: StoredImage, max_bytes: int) -> None:
    if len(stored.data) > max_bytes:
        raise DataError(f"the image has {len(stored.data):,} bytes; the limit is {max_bytes:,}")


@contextmanager
def _opened(stored: StoredImage, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image file whose header says that it has no more pixels; whatever fails is a DataError."""
    check_tiff(stored.data, max_pixels)
    try:
        with Image.open(io.BytesIO(stored.data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooManyPixelsError(f"the image has {width} x {height} pixels; the limit is {max_pixels:,} in all")
            check_mode(image)
            yield image
    except UnidentifiedImageError:
        raise DataError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # Pillow's own limit, which it checks before ours
        raise TooManyPixelsError(f"the image has far more pixels than the limit of {max_pixels:,} in all") from None
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError, EOFError, ...
        raise DataError(f"the image is corrupt: {error}") from None


def check_tiff(data: bytes, max_pixels: int) -> None:
    """Checks the first page of a TIFF: that its tags fit into the file, and its tiles into the limit.

    Anything else than a TIFF is let pass. Raises DataError if they do not fit, or if there is no first page.
    """
    if not data.startswith((b"II", b"MM")):
        return
    if data[:4] not in TIFF_HEADERS:
        raise DataError("the image is corrupt: it begins as a TIFF does and is not one")
    order, big = TIFF_HEADERS[data[:4]]
    entry = struct.Struct(f"{order}HH{'Q8s' if big else 'I4s'}")
    try:
        (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
        first = start + (8 if big else 2)
        if count > (len(data) - first) // entry.size:
            raise struct.error
        tags = [entry.unpack_from(data, first + number * entry.size) for number in range(count)]
    except (struct.error, OverflowError):
        raise DataError("the image is corrupt: the list of its tags is not in the file") from None
    sizes = [TYPE_BYTES.get(kind, 0) * number for _, kind, number, _ in tags]
    if sum(size for size in sizes if size > (8 if big else 4)) > len(data):
        raise DataError("the image is corrupt: its tags have more bytes than the file")
    if (parts := max((number for tag, _, number, _ in tags if tag in PARTS), default=0)) > MOST_PARTS:
        raise DataError(f"the image lies in {parts:,} strips or tiles; the limit is {MOST_PARTS:,}: save it anew")
    sides: dict[int, int] = {}
    for tag, kind, _, value in tags:
        if tag in (TILE_WIDTH, TILE_HEIGHT) and kind in NUMBERS:
            sides[tag] = max(sides.get(tag, 0), struct.unpack_from(order + NUMBERS[kind], value)[0])
    if (width := sides.get(TILE_WIDTH, 0)) * (height := sides.get(TILE_HEIGHT, 0)) > max_pixels or width > max_pixels:
        raise DataError(f"the image's tiles have {width} x {height} pixels; the limit is {max_pixels:,} in all")


def upright(image: Image.Image) -> Image.Image:
    """Returns a picture as all of genssl sees it: turned as its EXIF says, in mode L if it is grey, else in RGB.

    A picture that has been converted, turned or cropped since it was opened is taken as it stands: Pillow hands its
    EXIF on all the same, and whoever had it before may have turned it.

    16-bit grey, 0..65535, becomes 0..255. Transparency is dropped, and CMYK and palettes become RGB as Pillow does it.

    Raises:
        DataError: for 32-bit integers and floats, and for EXIF data that cannot be read.
    """
    check_mode(image)
    image.load()  # turns a TIFF, and takes its tag of that away
    tags = getattr(image, "tag_v2", {})
    as_opened = image.format is not None
    try:
        orientation = image.getexif().get(ORIENTATION, UPRIGHT) if as_opened else UPRIGHT
    except Exception as error:  # SyntaxError, struct.error, ValueError, ...
        raise DataError(f"the image's EXIF data is corrupt: {error}") from None
    if orientation != UPRIGHT:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _eight_bits(image, (*tags.get(BITS_PER_SAMPLE, ()), 16)[0], tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    if image.mode == "La":
        image = image.convert("LA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raises DataError for a picture of 32-bit integers or floats: which of them is white, no file says."""
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise DataError(
            f"the image has {kind} as pixels (mode {image.mode}), which have no white of their own; bring it to 8 or "
            "16 bits a channel"
        )


def _eight_bits(image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    """Returns grey of 9 to 16 bits as mode L; Pillow's own conversion would clip at 255."""
    grey = np.empty((image.height, image.width), np.uint8)
    white = 2 ** min(max(bits, 9), 16) - 1
    for top in range(0, image.height, ROWS_AT_ONCE):  # as float64 all of it would take 16 bytes a pixel
        rows = image.crop((0, top, image.width, min(top + ROWS_AT_ONCE, image.height)))
        grey[top : top + rows.height] = (np.asarray(rows, np.float64).clip(0, white) / (white / 255)).round()
    # Pillow turns TIFFs in which zero is white around where they have 8 bits, and only there.
    return Image.fromarray(255 - grey if white_is_zero else grey)


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
    # The square is cut out before it is resized (the other order differs at the outermost pixels only): otherwise the
    # long side would grow with the short one.
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    square = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
