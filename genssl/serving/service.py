"""The RPCs of the generation service."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from PIL import Image

from genssl import __version__
from genssl.config.server import LimitsConfig
from genssl.data.base import StoredImage, UInt8Array
from genssl.data.decode import decode
from genssl.errors import DataError, RequestRefusedError, suggest
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.serving.batcher import Batcher, Made
from genssl.variants.engine import EmbeddingCache, Row, VariantEngine

log = logging.getLogger(__name__)

CODEC_THREADS = 2
OUTPUT_ENCODINGS = (pb.IMAGE_ENCODING_RAW, pb.IMAGE_ENCODING_PNG)


class Hosted:
    """A generator on this server: its engine, queue and embedding cache.

    Args:
        generator_id: the name by which requests ask for it.
        engine: makes its variants.
        device: the one-thread executor of the device.
        cached_embeddings: how many source embeddings are kept.
    """

    def __init__(self, generator_id: str, engine: VariantEngine, device: Executor, cached_embeddings: int) -> None:
        self.generator_id, self.engine = generator_id, engine
        self.batcher = Batcher(engine, device)
        self.embeddings = EmbeddingCache(cached_embeddings)

    def info(self) -> pb.GeneratorInfo:
        """Returns what ListGenerators says of it."""
        spec = self.engine.generator.spec
        return pb.GeneratorInfo(
            generator_id=self.generator_id,
            name=spec.name,
            model=spec.model,
            fingerprint=spec.fingerprint,
            embedding_dim=spec.embedding_dim,
            image_size=spec.image_size,
            licence=spec.licence,
            default_parameters={key: float(value) for key, value in spec.defaults.items()},
            settings=spec.settings,
        )


@dataclass
class _Failure:
    """Why a source or a specification cannot be served."""

    code: pb.ItemCode
    message: str


class GenerationService(pb_grpc.GenerationServiceServicer):
    """Answers for the generators in `hosted`, which is empty until all of them are loaded.

    Args:
        limits: checked before anything is decoded.
        device: the one-thread executor that owns the device.
        device_name: for GetServerInfo.
    """

    def __init__(self, limits: LimitsConfig, device: Executor, device_name: str) -> None:
        self.hosted: dict[str, Hosted] = {}
        self.loading = True
        self._limits, self._device, self._device_name = limits, device, device_name
        self._codec = ThreadPoolExecutor(CODEC_THREADS, thread_name_prefix="genssl-codec")

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Returns version, device and limits."""
        return pb.GetServerInfoResponse(
            version=__version__,
            device=self._device_name,
            max_variants_per_request=self._limits.max_variants_per_request,
            max_message_bytes=self._limits.max_message_bytes,
            max_image_bytes=self._limits.max_image_bytes,
            max_image_pixels=self._limits.max_image_pixels,
        )

    async def ListGenerators(
        self, request: pb.ListGeneratorsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListGeneratorsResponse:
        """Returns the generators that are loaded."""
        return pb.ListGeneratorsResponse(generators=[hosted.info() for hosted in self.hosted.values()])

    async def GenerateVariants(
        self, request: pb.GenerateVariantsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateVariantsResponse:
        """Makes the variants of a request; see the .proto for the contract."""
        hosted = self.hosted.get(request.generator_id)
        if hosted is None and self.loading:
            # A client that was here before a restart asks again; NOT_FOUND would end its run.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is still loading")
        if hosted is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"there is no generator {request.generator_id!r} here{suggest(request.generator_id, self.hosted)}",
            )
            raise AssertionError("abort raises")
        spec = hosted.engine.generator.spec
        if request.expected_fingerprint and request.expected_fingerprint != spec.fingerprint:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"generator {request.generator_id!r} has the fingerprint {spec.fingerprint.hex()}, "
                f"not {request.expected_fingerprint.hex()}: its weights, config or code have changed",
            )
        await self._admit(request, hosted, context)

        started = time.perf_counter()
        embeddings, missing, embed_seconds = await self._embed_sources(request.sources, hosted)
        rows: dict[int, Row] = {}
        failures: dict[int, _Failure] = {}
        for position, wanted in enumerate(request.variants):
            row = _row(request, wanted, hosted.engine, embeddings)
            if isinstance(row, Row):
                rows[position] = row
            else:
                failures[position] = row
        made = dict(zip(rows, await hosted.batcher.submit(list(rows.values())), strict=True))
        generated = time.perf_counter()

        encoding = request.output.encoding or pb.IMAGE_ENCODING_RAW
        loop = asyncio.get_running_loop()
        variants = await loop.run_in_executor(self._codec, _encode_all, len(request.variants), made, failures, encoding)
        device_seconds = embed_seconds + sum(item.seconds for item in made.values() if isinstance(item, Made))
        return pb.GenerateVariantsResponse(
            variants=variants,
            missing_digests=missing,
            timings=pb.Timings(
                queue_seconds=max(0.0, generated - started - device_seconds),
                generate_seconds=device_seconds,
                encode_seconds=time.perf_counter() - generated,
            ),
        )

    async def close(self) -> None:
        """Stops every queue."""
        for hosted in self.hosted.values():
            await hosted.batcher.close()
        self._codec.shutdown(wait=False, cancel_futures=True)

    async def _admit(
        self, request: pb.GenerateVariantsRequest, hosted: Hosted, context: grpc.aio.ServicerContext
    ) -> None:
        """Refuses what breaks a limit, before any work is done for it."""
        count, most = len(request.variants), self._limits.max_variants_per_request
        if not 0 < count <= most:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"the request asks for {count} variants; 1 to {most} are allowed"
            )
        if len(request.sources) > count:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"the request has {len(request.sources)} sources for {count} variants"
            )
        if request.output.encoding not in (pb.IMAGE_ENCODING_UNSPECIFIED, *OUTPUT_ENCODINGS):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "output.encoding must be RAW or PNG")
        if hosted.batcher.queued + count > self._limits.max_queued_variants:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{hosted.batcher.queued} variants wait already; the limit is {self._limits.max_queued_variants}",
            )

    async def _embed_sources(
        self, sources: Sequence[pb.SourceImage], hosted: Hosted
    ) -> tuple[list[torch.Tensor | _Failure], list[bytes], float]:
        """Returns each source's embedding, or why there is none; the digests to be sent with data; device seconds."""
        found: list[torch.Tensor | _Failure | None] = [hosted.embeddings.get(source.digest) for source in sources]
        missing, to_decode = [], []
        for position, source in enumerate(sources):
            if found[position] is not None:
                continue
            if source.data:
                to_decode.append(position)
            else:
                missing.append(source.digest)
                found[position] = _Failure(
                    pb.ITEM_CODE_SOURCE_MISSING, "the server does not know this source; send its data"
                )
        loop = asyncio.get_running_loop()
        images = await asyncio.gather(
            *(
                loop.run_in_executor(self._codec, _decode, sources[position], hosted.engine, self._limits)
                for position in to_decode
            )
        )
        good, seconds = [], 0.0
        for position, image in zip(to_decode, images, strict=True):
            if isinstance(image, _Failure):
                found[position] = image
            else:
                good.append((position, image))
        if good:
            try:
                embedded, seconds = await loop.run_in_executor(
                    self._device, hosted.engine.embed, [image for _, image in good]
                )
            except Exception:
                log.exception("embedding %d sources failed", len(good))
                failure = _Failure(pb.ITEM_CODE_GENERATOR_FAILED, "the conditioner failed; see the server's log")
                for position, _ in good:
                    found[position] = failure
            else:
                for (position, _), embedding in zip(good, embedded, strict=True):
                    found[position] = embedding
                    hosted.embeddings.put(sources[position].digest, embedding)
        return [item for item in found if item is not None], missing, seconds


def _row(
    request: pb.GenerateVariantsRequest,
    wanted: pb.VariantSpec,
    engine: VariantEngine,
    embeddings: list[torch.Tensor | _Failure],
) -> Row | _Failure:
    if wanted.source_index >= len(request.sources):
        return _Failure(
            pb.ITEM_CODE_BAD_SPEC,
            f"source_index {wanted.source_index} is beyond the {len(request.sources)} sources of the request",
        )
    embedding = embeddings[wanted.source_index]
    if isinstance(embedding, _Failure):
        return embedding
    try:
        settings = engine.complete({**request.parameters, **wanted.parameters})
    except (RequestRefusedError, ValueError, OverflowError) as error:
        return _Failure(pb.ITEM_CODE_BAD_SPEC, str(error))
    seed = wanted.seed if wanted.HasField("seed") else None
    return engine.row(request.sources[wanted.source_index].digest, embedding, wanted.variant_index, settings, seed)


def _decode(source: pb.SourceImage, engine: VariantEngine, limits: LimitsConfig) -> UInt8Array | _Failure:
    """Checks, decodes and preprocesses one source; runs in the codec pool."""
    if source.encoding not in (pb.IMAGE_ENCODING_RAW, pb.IMAGE_ENCODING_FILE):
        return _Failure(pb.ITEM_CODE_BAD_IMAGE, "a source's encoding must be RAW or FILE")
    stored = StoredImage(
        data=source.data,
        encoding="raw" if source.encoding == pb.IMAGE_ENCODING_RAW else "file",
        channels=source.channels,
        height=source.height,
        width=source.width,
    )
    # Checked here and not believed: a wrong digest would poison the embedding cache for other clients.
    if stored.source_id != source.digest:
        return _Failure(
            pb.ITEM_CODE_DIGEST_MISMATCH, f"the data has the digest {stored.source_id.hex()}, not {source.digest.hex()}"
        )
    try:
        return engine.generator.preprocess(
            decode(stored, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
        )
    except DataError as error:
        return _Failure(pb.ITEM_CODE_BAD_IMAGE, str(error))


def _encode_all(
    count: int, made: dict[int, Made | BaseException], failures: dict[int, _Failure], encoding: pb.ImageEncoding
) -> list[pb.Variant]:
    return [_variant(position, made.get(position), failures.get(position), encoding) for position in range(count)]


def _variant(
    position: int, made: Made | BaseException | None, failure: _Failure | None, encoding: pb.ImageEncoding
) -> pb.Variant:
    if not isinstance(made, Made):
        failure = failure or _Failure(pb.ITEM_CODE_GENERATOR_FAILED, str(made))
        return pb.Variant(spec_index=position, status=pb.ItemStatus(code=failure.code, message=failure.message))
    channels, height, width = made.image.shape
    return pb.Variant(
        spec_index=position,
        data=made.image.tobytes() if encoding == pb.IMAGE_ENCODING_RAW else _png(made.image),
        encoding=encoding,
        channels=channels,
        height=height,
        width=width,
        origin=pb.ORIGIN_GENERATED,
        status=pb.ItemStatus(code=pb.ITEM_CODE_OK),
    )


def _png(image: UInt8Array) -> bytes:
    buffer = io.BytesIO()
    pixels: Any = image.transpose(1, 2, 0)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
