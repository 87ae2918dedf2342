"""One stored variant as bytes: a header that says what it is, and the image. Format 1 of `genssl-variants`.

A record describes itself: key, shape, encoding and checksum stand in it, so a store whose trees are damaged can still
be read record by record. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from genssl.data.base import UInt8Array
from genssl.variants.key import PERSON, VariantKey

Encoding = Literal["raw", "png"]

# magic with version, CRC-32 of all that follows, encoding, channels, 2 spare bytes, height, width, index, source id,
# fingerprint, parameters digest, unix time in seconds
HEADER = struct.Struct("<4sIBBHIIQ16s16s16sd")
MAGIC = b"gsv1"
SHAPE = struct.Struct("<BBHII")  # encoding .. width of the header
NAMES, INDEX = slice(28, 76), slice(20, 28)  # source id .. parameters, and index: what the key's digest is made of
IDENTITY = slice(4, 76)  # checksum .. parameters: all that tells one record from another
UNNAMED = hashlib.blake2b(digest_size=16, person=PERSON)
CHECKED_FROM = 8  # the CRC covers header and image, so a flipped bit in the shape or the key is found as well
ENCODINGS: tuple[Encoding, ...] = ("raw", "png")
RAW, PNG = range(2)
PNG_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Head:
    """What the header of a record says."""

    key: VariantKey  # what the image is a function of
    encoding: Encoding  # how the image is stored
    shape: tuple[int, int, int]  # [C, h, w] of the image
    created: float  # unix time in seconds


def encode(key: VariantKey, image: UInt8Array, encoding: Encoding = "raw") -> bytes:
    """Returns the record of an image uint8 [C, h, w]; png (lossless) takes 1 or 3 channels."""
    channels, height, width = image.shape
    assert image.dtype == np.uint8, "variants are uint8"
    payload = image.tobytes() if encoding == "raw" else _to_png(image)
    fields = (ENCODINGS.index(encoding), channels, 0, height, width)
    named = (key.index, key.source_id, key.fingerprint, key.parameters, time.time())
    unchecked = HEADER.pack(MAGIC, 0, *fields, *named)
    checksum = zlib.crc32(payload, zlib.crc32(unchecked[CHECKED_FROM:]))
    return HEADER.pack(MAGIC, checksum, *fields, *named) + payload


def is_intact(record: bytes | memoryview) -> bool:
    """Says whether the bytes are a record of this format whose checksum is right."""
    if len(record) < HEADER.size or record[:4] != MAGIC:
        return False
    return zlib.crc32(memoryview(record)[CHECKED_FROM:]) == int.from_bytes(record[4:CHECKED_FROM], "little")


def digest_of(record: bytes) -> bytes:
    """Returns the digest of the key that stands in a record, as `VariantKey.digest` does but three times as fast.

    A tree with a flipped bit may lead to another variant's record, which is intact, so whoever reads a record compares
    this with the digest that he asked for. Of other bytes it is the digest of nothing.
    """
    hashed = UNNAMED.copy()
    hashed.update(record[NAMES])
    hashed.update(record[INDEX])
    return hashed.digest()


def decode_image(record: bytes, *, checked: bool = False) -> UInt8Array | None:
    """Returns the image uint8 [C, h, w] of a record, read-only, or None if the record is damaged.

    `checked` says that its checksum was found right before; that takes three times as long as all the rest of a read.
    """
    if not checked and not is_intact(record):
        return None
    encoding, channels, _, height, width = SHAPE.unpack_from(record, CHECKED_FROM)
    if encoding == PNG:
        return from_png(record[HEADER.size :], channels, height, width)
    if encoding != RAW or len(record) != HEADER.size + channels * height * width:
        return None
    return np.ndarray((channels, height, width), np.uint8, record, HEADER.size)


def read_head(record: bytes) -> Head:
    """Returns what the header of an intact record says; its first HEADER.size bytes are enough."""
    fields = HEADER.unpack_from(record)
    _, _, encoding, channels, _, height, width, index, source_id, fingerprint, parameters, created = fields
    key = VariantKey(source_id, fingerprint, parameters, index)
    return Head(key, ENCODINGS[encoding], (channels, height, width), created)


def png_of(record: bytes) -> bytes:
    """Returns the image of an intact record with 1 or 3 channels as a PNG file."""
    head = read_head(record)
    if head.encoding == "png":
        return record[HEADER.size :]
    return _to_png(np.ndarray(head.shape, np.uint8, record, HEADER.size))


def _to_png(image: UInt8Array) -> bytes:
    from PIL import Image

    channels = image.shape[0]
    assert channels in PNG_MODES, "PNG holds 1 or 3 channels"
    pixels = image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def from_png(payload: bytes, channels: int, height: int, width: int) -> UInt8Array | None:
    """Returns the image uint8 [C, h, w] of a PNG file, or None if it is damaged or has another shape."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(payload), formats=["PNG"]) as opened:
            # The header's size is checked before the pixels are decoded: a store may come from someone else.
            if opened.size != (width, height) or opened.mode != PNG_MODES.get(channels):
                return None
            pixels = np.asarray(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
