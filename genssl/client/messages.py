"""The messages of a client: requests, cut to a server's limits, what comes back in them, and the token beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from genssl.base.wording import counted
from genssl.client.server_state import Target
from genssl.data.base import RAW, StoredImage, UInt8Array
from genssl.errors import RequestRefusedError, UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.variants.ledger import Origin
from genssl.variants.source import VariantRequest

Received = tuple[UInt8Array, Origin]
Priority = Literal["interactive", "training", "bulk"]
PRIORITIES: dict[str, pb.Priority] = {
    "interactive": pb.PRIORITY_INTERACTIVE,
    "training": pb.PRIORITY_TRAINING,
    "bulk": pb.PRIORITY_BULK,
}
# A variant from the server's memory was not made for this request either; trainers need not tell the two apart.
ORIGINS: dict[int, Origin] = {
    pb.ORIGIN_GENERATED: "generated",
    pb.ORIGIN_STORE: "store",
    pb.ORIGIN_MEMORY: "store",
}


@dataclass
class Answer:
    """What a request brought, its images in order, and what it cost.

    That is device seconds of the servers, bytes of variants, calls that were answered, calls repeated (of them
    `refusals` where a server was full), and seconds in all.
    """

    images: list[Received] = field(default_factory=list)
    generator_seconds: float = 0.0
    bytes_received: int = 0
    calls: int = 0
    retries: int = 0
    refusals: int = 0
    seconds: float = 0.0


@dataclass
class VariantBatch:
    """Variants as a trainer wants them.

    Attributes:
        images: uint8 [N, 3, h, w], one for each image asked for, in their order.
        origins: N of "generated" (computed for this call) or "store" (the server had it already).
        source_ids: N times 16 bytes that name the sources.
        seconds: that the call took.
        retries: calls repeated, because a server was away, full or late.
        model: of the generator, as the servers name it.
    """

    images: UInt8Array
    origins: list[Origin]
    source_ids: list[bytes]
    seconds: float
    retries: int
    model: str = ""

    def __repr__(self) -> str:
        """In one line, however many pixels there are."""
        shape = "x".join(map(str, self.images.shape[1:]))
        origins = ", ".join(f"{count} {origin}" for origin, count in sorted(Counter(self.origins).items()))
        text = f"{counted(len(self.images), 'variant')} of {shape}: {origins or 'none'}; {self.seconds:.3f} s"
        return f"VariantBatch({text}, {counted(self.retries, 'retry', 'retries')})"


def check_priority(priority: str) -> Priority:
    """Returns the priority; raises ValueError if it is not one."""
    if priority not in PRIORITIES:
        raise ValueError(f"priority is {priority!r}; allowed: {', '.join(PRIORITIES)}")
    return priority  # type: ignore[return-value]


def build_request(
    generator: pb.GeneratorInfo,
    wanted: Sequence[VariantRequest],
    *,
    seeds: Sequence[int | None],
    data: Mapping[bytes, StoredImage],
    parameters: Mapping[str, float],
    priority: Priority,
    client_id: str,
) -> pb.GenerateVariantsRequest:
    """Returns the request for `wanted`, with the stored bytes of those sources that `data` has."""
    request = pb.GenerateVariantsRequest(
        generator_id=generator.generator_id,
        expected_fingerprint=generator.fingerprint,
        parameters={key: float(value) for key, value in parameters.items()},
        output=pb.OutputSpec(encoding=pb.IMAGE_ENCODING_RAW),
        priority=PRIORITIES[priority],
        client_id=client_id,
    )
    positions: dict[bytes, int] = {}
    for item, seed in zip(wanted, seeds, strict=True):
        if item.source_id not in positions:
            positions[item.source_id] = len(positions)
            request.sources.append(_source(item.source_id, data.get(item.source_id)))
        request.variants.append(
            pb.VariantSpec(source_index=positions[item.source_id], variant_index=item.index, seed=seed)
        )
    return request


def _source(digest: bytes, image: StoredImage | None) -> pb.SourceImage:
    if image is None:
        return pb.SourceImage(digest=digest)
    return pb.SourceImage(
        digest=digest,
        data=image.data,
        encoding=pb.IMAGE_ENCODING_RAW if image.encoding == RAW else pb.IMAGE_ENCODING_FILE,
        channels=image.channels,
        height=image.height,
        width=image.width,
    )


def cut_uploads(
    wanted: Sequence[VariantRequest],
    items: Sequence[int],
    load: Callable[[int], StoredImage],
    targets: Sequence[Target],
    name: Callable[[int], str],
) -> list[tuple[list[int], dict[bytes, StoredImage]]]:
    """Reads the sources of `items` and cuts the items so that no message exceeds the limit of any server.

    Reads files; call it in a thread, since a slow disk must not hold up the calls under way. Returns, for each message,
    the positions in `wanted` and the sources by their names. Raises RequestRefusedError, in which `name` says what the
    user calls an image, if an image alone is too large.
    """
    strictest = min(targets, key=lambda target: target.image_bytes())
    most, space = strictest.image_bytes(), min(target.message_bytes() for target in targets)
    messages: list[tuple[list[int], dict[bytes, StoredImage]]] = []
    room = 0
    for item in items:
        request = wanted[item]
        if messages and request.source_id in messages[-1][1]:
            messages[-1][0].append(item)
            continue
        stored = load(request.row)
        if len(stored.data) > most:
            raise RequestRefusedError(
                f"{name(item)} has {len(stored.data):,} bytes; the generation server at "
                f"{strictest.address} takes at most {most:,} (limits.max_image_bytes of its file): raise that, or give "
                f"{'the bytes of an image file, or fewer pixels' if stored.encoding == RAW else 'a smaller file'}"
            )
        if not messages or len(stored.data) > room:
            messages.append(([], {}))
            room = space
        messages[-1][0].append(item)
        messages[-1][1][request.source_id] = stored
        room -= len(stored.data)
    return messages


def read_variant(wanted: VariantRequest, variant: pb.Variant, *, address: str, name: Callable[[], str]) -> Received:
    """Returns a delivered variant uint8 [3, h, w], read-only, and its origin; `name` is the image's in messages.

    Raises RequestRefusedError if the server could not make it.
    """
    if variant.status.code != pb.ITEM_CODE_OK:
        code = pb.ItemCode.Name(variant.status.code).removeprefix("ITEM_CODE_")
        raise RequestRefusedError(
            f"the generation server at {address} could not make variant {wanted.index} of {name()}: {code}: "
            f"{variant.status.message}"
        )
    pixels = np.frombuffer(variant.data, np.uint8).reshape(variant.channels, variant.height, variant.width)
    return pixels, ORIGINS[variant.origin]


def read_token_file(path: Path, where: str) -> str:
    """Returns the token that a file holds, without white space around it.

    Raises UserError, which begins with `where`, the option or key path, if the file cannot be read or holds no token.
    """
    try:
        token = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{where}: {path} cannot be read ({reason}); give a file with the token alone in it") from None
    if not (token and token.isascii() and token.isprintable()):
        raise UserError(f"{where}: {path} holds no token; put the server's token, and nothing else, into it")
    return token
