"""Pixels in and out of messages: checks and decodes sources, builds variants. Runs in the codec pool."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from genssl.config.limits import LimitsConfig
from genssl.data.base import StoredImage, UInt8Array
from genssl.data.decode import TooManyPixelsError, count_pixels, decode
from genssl.errors import DataError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.server.codec_pool import CodecPool, Turn
from genssl.variants.engine import VariantEngine

# Below this, building the answer takes less time than handing it to another thread.
ENCODED_IN_PLACE_BYTES = 2**20
OUTPUT_ENCODINGS = (pb.IMAGE_ENCODING_RAW, pb.IMAGE_ENCODING_PNG)
_OK = pb.ItemStatus(code=pb.ITEM_CODE_OK)


@dataclass(frozen=True)
class Failure:
    """Why an item cannot be served; `message` is for the client's user."""

    code: pb.ItemCode
    message: str


@dataclass(frozen=True)
class Ready:
    """A variant uint8 [3, h, w], where it came from, and whether it was computed for another request."""

    image: UInt8Array
    origin: pb.Origin
    shared: bool = False


def check_source(source: pb.SourceImage, limits: LimitsConfig) -> int | Failure:
    """Checks one source as far as that goes without decoding it; returns how many pixels it says it has."""
    if source.encoding not in (pb.IMAGE_ENCODING_RAW, pb.IMAGE_ENCODING_FILE):
        return Failure(pb.ITEM_CODE_BAD_IMAGE, "a source's encoding must be RAW or FILE")
    stored = _stored(source)
    if len(stored.data) > limits.max_image_bytes:  # before it is hashed
        return Failure(
            pb.ITEM_CODE_BAD_IMAGE,
            f"the image has {len(stored.data):,} bytes; the limit is {limits.max_image_bytes:,} "
            "(limits.max_image_bytes of the server file)",
        )
    # Checked here and not believed: a wrong digest would poison embeddings, cache and store for other clients.
    if stored.source_id != source.digest:
        return Failure(
            pb.ITEM_CODE_DIGEST_MISMATCH, f"the data has the digest {stored.source_id.hex()}, not {source.digest.hex()}"
        )
    try:
        return count_pixels(stored, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
    except DataError as error:
        return _bad_image(error)


def decode_source(source: pb.SourceImage, engine: VariantEngine, limits: LimitsConfig) -> UInt8Array | Failure:
    """Decodes and preprocesses one source that was checked, to uint8 [3, S, S]."""
    try:
        return engine.generator.preprocess(
            decode(_stored(source), max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
        )
    except DataError as error:
        return _bad_image(error)


def _bad_image(error: DataError) -> Failure:
    setting = " (limits.max_image_pixels of the server file)" if isinstance(error, TooManyPixelsError) else ""
    return Failure(pb.ITEM_CODE_BAD_IMAGE, f"{error}{setting}")


def _stored(source: pb.SourceImage) -> StoredImage:
    return StoredImage(
        data=source.data,
        encoding="raw" if source.encoding == pb.IMAGE_ENCODING_RAW else "file",
        channels=source.channels,
        height=source.height,
        width=source.width,
    )


async def encode_variants(
    items: Sequence[Ready | Failure], encoding: pb.ImageEncoding, pool: CodecPool, turn: Turn
) -> list[pb.Variant]:
    """Returns one message an item, in order, RAW unless told otherwise; what takes long is done in the pool."""
    encoding = encoding or pb.IMAGE_ENCODING_RAW
    encode = partial(_variant, encoding=encoding)
    pixels = [item.image.size // 3 if isinstance(item, Ready) else 0 for item in items]
    if encoding == pb.IMAGE_ENCODING_RAW and 3 * sum(pixels) < ENCODED_IN_PLACE_BYTES:
        variants = [encode(item) for item in items]
    else:
        variants = await pool.map(turn, encode, items, pixels)
    for position, variant in enumerate(variants):
        variant.spec_index = position
    return variants


def _variant(item: Ready | Failure, encoding: pb.ImageEncoding) -> pb.Variant:
    if isinstance(item, Failure):
        return pb.Variant(status=pb.ItemStatus(code=item.code, message=item.message))
    channels, height, width = item.image.shape
    return pb.Variant(
        data=item.image.tobytes() if encoding == pb.IMAGE_ENCODING_RAW else _png(item.image),
        encoding=encoding,
        channels=channels,
        height=height,
        width=width,
        origin=item.origin,
        status=_OK,
    )


def _png(image: UInt8Array) -> bytes:
    buffer = io.BytesIO()
    pixels: Any = image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
