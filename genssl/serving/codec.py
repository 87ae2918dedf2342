"""Pixels in and out of messages: checks and decodes sources, builds variants. Runs in the codec pool."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from genssl.config.server import LimitsConfig
from genssl.data.base import StoredImage, UInt8Array
from genssl.data.decode import TooManyPixelsError, decode
from genssl.errors import DataError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.variants.engine import VariantEngine

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


def decode_source(source: pb.SourceImage, engine: VariantEngine, limits: LimitsConfig) -> UInt8Array | Failure:
    """Checks, decodes and preprocesses one source to uint8 [3, S, S]."""
    if source.encoding not in (pb.IMAGE_ENCODING_RAW, pb.IMAGE_ENCODING_FILE):
        return Failure(pb.ITEM_CODE_BAD_IMAGE, "a source's encoding must be RAW or FILE")
    if len(source.data) > limits.max_image_bytes:  # before it is hashed
        return Failure(
            pb.ITEM_CODE_BAD_IMAGE,
            f"the image has {len(source.data):,} bytes; the limit is {limits.max_image_bytes:,} "
            "(limits.max_image_bytes of the server file)",
        )
    stored = StoredImage(
        data=source.data,
        encoding="raw" if source.encoding == pb.IMAGE_ENCODING_RAW else "file",
        channels=source.channels,
        height=source.height,
        width=source.width,
    )
    # Checked here and not believed: a wrong digest would poison embeddings, cache and store for other clients.
    if stored.source_id != source.digest:
        return Failure(
            pb.ITEM_CODE_DIGEST_MISMATCH, f"the data has the digest {stored.source_id.hex()}, not {source.digest.hex()}"
        )
    try:
        return engine.generator.preprocess(
            decode(stored, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
        )
    except TooManyPixelsError as error:
        return Failure(pb.ITEM_CODE_BAD_IMAGE, f"{error} (limits.max_image_pixels of the server file)")
    except DataError as error:
        return Failure(pb.ITEM_CODE_BAD_IMAGE, str(error))


def encode_variants(items: list[Ready | Failure], encoding: pb.ImageEncoding) -> list[pb.Variant]:
    """Returns one message an item, in order."""
    return [_variant(position, item, encoding) for position, item in enumerate(items)]


def _variant(position: int, item: Ready | Failure, encoding: pb.ImageEncoding) -> pb.Variant:
    if isinstance(item, Failure):
        return pb.Variant(spec_index=position, status=pb.ItemStatus(code=item.code, message=item.message))
    channels, height, width = item.image.shape
    return pb.Variant(
        spec_index=position,
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
