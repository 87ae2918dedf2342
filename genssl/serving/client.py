"""An asynchronous client of one generation server: digest first, retries of what may be repeated, clear errors."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from genssl.data.base import RAW, StoredImage, UInt8Array
from genssl.errors import RequestRefusedError, ServerUnavailableError, suggest
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.generators.base import Parameters
from genssl.serving.channel import CLIENT_OPTIONS
from genssl.variants.ledger import Origin
from genssl.variants.source import VariantRequest

RETRIED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
MESSAGE_OVERHEAD, ROW_OVERHEAD = 2**16, 128  # bytes that protobuf fields take beside the pixels, generously
FIRST_BACKOFF, LONGEST_BACKOFF = 0.1, 2.0
CONNECT_SECONDS = 15.0  # a wrong address should be told soon
LOADING_SECONDS = 900.0  # a large model on a slow disk
ORIGINS: dict[int, Origin] = {pb.ORIGIN_GENERATED: "generated", pb.ORIGIN_STORE: "store"}


@dataclass
class Answer:
    """What a request brought: images uint8 [3, h, w] with origins, in the order of the request, and what they cost."""

    images: list[tuple[UInt8Array, Origin]]
    generator_seconds: float = 0.0
    bytes_received: int = 0
    calls: int = 0
    retries: int = 0


class GenerationClient:
    """Talks to one server over one channel. Must be made and used on one running event loop.

    Calls for variants are repeated for as long as the server is away or overloaded; whoever waits for them sets the
    limit, and `state` says what the trouble is.

    Args:
        address: host:port or unix:/path.
        client_id: names this client in the server's logs.
    """

    def __init__(self, address: str, *, client_id: str = "") -> None:
        self.address, self._client_id = address, client_id
        self.limits = pb.GetServerInfoResponse()
        self.trouble = ""
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
        self._jitter = random.Random()
        self._stub = pb_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    async def connect(self) -> None:
        """Asks the server for its limits; a first call that tells soon whether there is a server at all.

        Raises:
            ServerUnavailableError: if it does not answer within 15 s.
        """
        response, _ = await self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest(), CONNECT_SECONDS)
        assert isinstance(response, pb.GetServerInfoResponse)
        self.limits = response

    def most_rows(self, image_size: int) -> int:
        """Returns how many variants of this size (pixels) one call can bring within the server's limits."""
        fitting = (self.limits.max_message_bytes - MESSAGE_OVERHEAD) // (3 * image_size * image_size + ROW_OVERHEAD)
        return max(1, min(self.limits.max_variants_per_request, fitting))

    async def find_generator(self, name: str) -> pb.GeneratorInfo:
        """Returns the generator that the server offers under this id.

        Waits while the server is still loading.

        Raises:
            RequestRefusedError: if it offers others only.
            ServerUnavailableError: if it does not answer within 15 s, or is still loading after 15 minutes.
        """
        deadline = time.monotonic() + LOADING_SECONDS
        while True:
            response, _ = await self._call(self._stub.ListGenerators, pb.ListGeneratorsRequest(), CONNECT_SECONDS)
            assert isinstance(response, pb.ListGeneratorsResponse)
            offered: dict[str, pb.GeneratorInfo] = {info.generator_id: info for info in response.generators}
            if name in offered:
                return offered[name]
            if offered:
                raise RequestRefusedError(
                    f"the generation server at {self.address} has no generator {name!r}{suggest(name, offered)}"
                )
            if time.monotonic() > deadline:
                raise ServerUnavailableError(
                    f"the generation server at {self.address} has been loading for {LOADING_SECONDS:g} s; see its log"
                )
            await asyncio.sleep(0.2)

    async def generate(
        self,
        generator: pb.GeneratorInfo,
        wanted: Sequence[VariantRequest],
        load: Callable[[int], StoredImage],
        parameters: Parameters,
    ) -> Answer:
        """Fetches variants of one generator: by digest first, then those whose sources the server had to see.

        Args:
            generator: as `find_generator` returned it; the server must still have this fingerprint.
            wanted: the variants, at most `most_rows` of them.
            load: returns the stored image of a row; called only for sources that the server does not know.
            parameters: on top of the generator's defaults.

        Raises:
            RequestRefusedError: if the server refuses the request or one of its items.
        """
        answer = Answer(images=[])
        images: dict[int, tuple[UInt8Array, Origin]] = {}
        unknown = await self._fetch(generator, wanted, list(range(len(wanted))), {}, parameters, images, answer)
        for items, data in await asyncio.to_thread(self._in_messages, wanted, unknown, load):
            await self._fetch(generator, wanted, items, data, parameters, images, answer)
        answer.images = [images[item] for item in range(len(wanted))]
        return answer

    async def _fetch(
        self,
        generator: pb.GeneratorInfo,
        wanted: Sequence[VariantRequest],
        items: list[int],
        data: dict[bytes, StoredImage],
        parameters: Parameters,
        images: dict[int, tuple[UInt8Array, Origin]],
        answer: Answer,
    ) -> list[int]:
        """Makes one call for `items`, files its images, and returns the items whose source is unknown."""
        request = self._request(generator, [wanted[item] for item in items], data, parameters)
        response, retries = await self._call(self._stub.GenerateVariants, request, None)
        assert isinstance(response, pb.GenerateVariantsResponse)
        answer.calls += 1
        answer.retries += retries
        answer.generator_seconds += response.timings.generate_seconds
        unknown = []
        for item, variant in zip(items, response.variants, strict=True):
            if variant.status.code == pb.ITEM_CODE_SOURCE_MISSING and not data:
                unknown.append(item)
                continue
            images[item] = self._image(wanted[item], variant)
            answer.bytes_received += len(variant.data)
        return unknown

    def _in_messages(
        self, wanted: Sequence[VariantRequest], items: list[int], load: Callable[[int], StoredImage]
    ) -> list[tuple[list[int], dict[bytes, StoredImage]]]:
        """Reads the sources of `items` and cuts the items so that no message exceeds the server's limit.

        Runs in a thread: a slow disk must not hold up the calls under way.
        """
        messages: list[tuple[list[int], dict[bytes, StoredImage]]] = []
        room = 0
        for item in items:
            request = wanted[item]
            if messages and request.source_id in messages[-1][1]:
                messages[-1][0].append(item)
                continue
            stored = load(request.row)
            if len(stored.data) > self.limits.max_image_bytes:
                raise RequestRefusedError(
                    f"the image in row {request.row} has {len(stored.data):,} bytes; the generation server at "
                    f"{self.address} takes at most {self.limits.max_image_bytes:,} (limits.max_image_bytes)"
                )
            if not messages or len(stored.data) > room:
                messages.append(([], {}))
                room = self.limits.max_message_bytes - MESSAGE_OVERHEAD
            messages[-1][0].append(item)
            messages[-1][1][request.source_id] = stored
            room -= len(stored.data)
        return messages

    def _request(
        self,
        generator: pb.GeneratorInfo,
        wanted: Sequence[VariantRequest],
        data: dict[bytes, StoredImage],
        parameters: Parameters,
    ) -> pb.GenerateVariantsRequest:
        request = pb.GenerateVariantsRequest(
            generator_id=generator.generator_id,
            expected_fingerprint=generator.fingerprint,
            parameters={key: float(value) for key, value in parameters.items()},
            output=pb.OutputSpec(encoding=pb.IMAGE_ENCODING_RAW),
            priority=pb.PRIORITY_TRAINING,
            client_id=self._client_id,
        )
        positions: dict[bytes, int] = {}
        for item in wanted:
            if item.source_id not in positions:
                positions[item.source_id] = len(positions)
                request.sources.append(_source(item.source_id, data.get(item.source_id)))
            request.variants.append(pb.VariantSpec(source_index=positions[item.source_id], variant_index=item.index))
        return request

    def _image(self, wanted: VariantRequest, variant: pb.Variant) -> tuple[UInt8Array, Origin]:
        if variant.status.code != pb.ITEM_CODE_OK:
            code = pb.ItemCode.Name(variant.status.code).removeprefix("ITEM_CODE_")
            raise RequestRefusedError(
                f"the generation server at {self.address} could not make variant {wanted.index} of the image "
                f"in row {wanted.row}: {code}: {variant.status.message}"
            )
        pixels = np.frombuffer(variant.data, np.uint8).reshape(variant.channels, variant.height, variant.width)
        return pixels, ORIGINS[variant.origin]

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable, request: object, patience: float | None
    ) -> tuple[object, int]:
        """Calls a unary method, repeating while the server is away; returns the response and the number of repeats.

        Args:
            patience: seconds after which it gives up; None leaves that to whoever waits for the result.
        """
        started, backoff, retries = time.monotonic(), FIRST_BACKOFF, 0
        while True:
            timeout = None if patience is None else max(1.0, patience - (time.monotonic() - started))
            try:
                response = await method(request, timeout=timeout)
                self.trouble = ""
                return response, retries
            except grpc.aio.AioRpcError as error:
                code, details = error.code(), error.details() or ""
            # gRPC reports a message over the size limit as RESOURCE_EXHAUSTED too, but it will not shrink by waiting.
            if code not in RETRIED or "larger than max" in details:
                raise RequestRefusedError(f"the generation server at {self.address} refused: {code.name}: {details}")
            self.trouble = f"{code.name}: {details}"
            waited = time.monotonic() - started
            # Half to all of the back-off, so that clients of a restarted server do not return all at once.
            pause = backoff * (0.5 + self._jitter.random() / 2)
            if patience is not None and (code == grpc.StatusCode.DEADLINE_EXCEEDED or waited + pause > patience):
                raise ServerUnavailableError(f"after {waited:.0f} s {self.state()}")
            await asyncio.sleep(pause)
            backoff, retries = min(2 * backoff, LONGEST_BACKOFF), retries + 1

    def state(self) -> str:
        """Says, for an error message, how the server is doing and what to do about it."""
        if self.trouble:
            return (
                f"the generation server at {self.address} gives no answer ({self.trouble}). Start it again with "
                "`genssl serve-generator FILE`, correct variants.server, or set variants.server=embedded"
            )
        return (
            f"the generation server at {self.address} is too slow for this recipe, or stuck: raise "
            "variants.deadline_seconds, ask for fewer variants (views.probability, variants.per_image), "
            "or use a faster generator"
        )


def _source(digest: bytes, image: StoredImage | None) -> pb.SourceImage:
    if image is None:
        return pb.SourceImage(digest=digest)
    encoding = pb.IMAGE_ENCODING_RAW if image.encoding == RAW else pb.IMAGE_ENCODING_FILE
    return pb.SourceImage(
        digest=digest,
        data=image.data,
        encoding=encoding,
        channels=image.channels,
        height=image.height,
        width=image.width,
    )
