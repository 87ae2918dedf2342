"""One generator on a server: what was made is found again, what is missing is embedded and made."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch

from genssl.base.wording import counted
from genssl.config.server import ServerFile
from genssl.data.base import UInt8Array
from genssl.errors import RequestRefusedError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.models import foreign_data, trained_on
from genssl.generators.parameters import merge
from genssl.server.batching.batcher import Batcher
from genssl.server.batching.embedder import Embedder
from genssl.server.batching.jobs import (
    BatchListener,
    BatchReport,
    Caller,
    DeadlinePassedError,
    DropReason,
    GenerationFailedError,
    MadeImage,
)
from genssl.server.cache import MemoryCache, WriteThrough
from genssl.server.codec import CodecPool, Failure, ReadyVariant, decode_sources
from genssl.server.statistics import GeneratorCounters
from genssl.variants.engine import Row, Settings, VariantEngine
from genssl.variants.key import VariantKey

log = logging.getLogger(__name__)

SIZES = ("image_size", "output_size")  # parameters that say how many pixels are made
KEPT_SETTINGS = 64  # parameter mappings whose digests are remembered; a run uses one or two


@dataclass(frozen=True, eq=False)
class RequestedVariant:
    """A specification that makes sense: the variant's name, and what its row will be made of."""

    source: int  # position in the request's sources
    name: bytes  # 16 bytes, see `Row.name`
    seed: int  # of the noise
    settings: Settings  # of this variant
    key: VariantKey | None  # None if the client chose the seed


@dataclass(eq=False)
class RequestPlan:
    """What one request asks for, and what has become of it so far.

    Attributes:
        answers: one a specification, in order; None where the variant is still to be made.
    """

    sources: Sequence[pb.SourceImage]  # of the request
    answers: list[ReadyVariant | Failure | None]
    left: dict[int, RequestedVariant]  # the variants without an answer, by position
    missing: list[bytes] = field(default_factory=list)  # digests of sources that must be sent with their data
    device_seconds: float = 0.0  # this request's share of the device's time

    def answer(self, position: int, answer: ReadyVariant | Failure) -> None:
        """Enters what became of a variant."""
        self.answers[position] = answer
        del self.left[position]

    def finished(self) -> list[ReadyVariant | Failure]:
        """Returns the answers, of which none is missing any more."""
        return [answer for answer in self.answers if answer is not None]


class Hosted(BatchListener):
    """A generator with its queue, its embeddings, and the variants it has made.

    Args:
        generator_id: the name by which requests ask for it.
        engine: makes its variants.
        device: the one-thread executor that owns the device.
        memory: finished variants; all generators of a server share it.
        store: the server's store, or None.
        counters: its part of the server's statistics.
        file: for the limits.
        codec: where images are decoded.

    Attributes:
        batcher: its queue.
        source_bytes: what a decoded source takes.
    """

    def __init__(
        self,
        generator_id: str,
        engine: VariantEngine,
        device: Executor,
        *,
        memory: MemoryCache,
        store: WriteThrough | None,
        counters: GeneratorCounters,
        file: ServerFile,
        codec: CodecPool,
    ) -> None:
        self.generator_id, self.engine, self.counters = generator_id, engine, counters
        self._memory, self._store = memory, store
        self._file, self._codec, self._warned = file, codec, False
        self._settings: dict[tuple[tuple[str, float], ...], Settings] = {}
        self._redrawn = 0
        self.source_bytes = engine.generator.preprocess(np.zeros((3, 8, 8), np.uint8)).nbytes
        self.batcher = Batcher(engine, device, self, ageing_seconds=file.ageing_seconds)
        self._embedder = Embedder(engine, device, file.embedding_cache, counters, ageing_seconds=file.ageing_seconds)
        counters.watch(self.batcher)

    def info(self) -> pb.GeneratorInfo:
        """Returns what ListGenerators says of it."""
        return pb.GeneratorInfo(generator_id=self.generator_id, **self.engine.generator.spec.to_proto())

    def settings(self, parameters: Mapping[str, float]) -> Settings:
        """Returns the complete settings of given parameters.

        Raises:
            RequestRefusedError: for parameters that the generator cannot do.
        """
        name = tuple(sorted(parameters.items()))
        found = self._settings.get(name)
        if found is None:
            found = self.engine.complete(dict(parameters))
            self._check_sizes(found)
            if len(self._settings) >= KEPT_SETTINGS:
                self._settings.pop(next(iter(self._settings)))
            self._settings[name] = found
        return found

    def _check_sizes(self, settings: Settings) -> None:
        """Refuses images far larger than this generator's own: one of them could take all of the device's memory."""
        factor = self._file.limits.max_size_factor
        for name in SIZES:
            own = self.engine.generator.spec.defaults.get(name)
            if own is not None and settings.parameters[name] > factor * own:
                raise RequestRefusedError(
                    f"parameter {name}: {settings.parameters[name]} is more than this server makes; at most "
                    f"{int(factor * own)} is allowed (limits.max_size_factor)"
                )

    def variant_bytes(self, settings: Settings) -> int:
        """Returns the bytes of one variant's pixels."""
        side = int(settings.parameters.get("output_size", self.engine.generator.spec.image_size))
        return 3 * side * side

    def plan(self, request: pb.GenerateVariantsRequest, settings: Settings) -> RequestPlan:
        """Returns what a request wants; `settings` are those of the request's own parameters."""
        wanted = [self._requested(request, spec, settings) for spec in request.variants]
        return RequestPlan(
            request.sources,
            [item if isinstance(item, Failure) else None for item in wanted],
            {position: item for position, item in enumerate(wanted) if isinstance(item, RequestedVariant)},
        )

    async def find(self, plan: RequestPlan) -> None:
        """Answers those of a request's variants that were made before, from memory or the store."""
        self._find_in_memory(plan)
        names = {item.name for item in plan.left.values() if item.key is not None}
        if self._store is None or not names:
            return
        stored = await self._store.get(list(names))
        for name, image in stored.items():
            self._memory.put(name, image)
        for position, item in list(plan.left.items()):
            if item.name in stored:
                plan.answer(position, ReadyVariant(stored[item.name], pb.ORIGIN_STORE))

    async def make(self, plan: RequestPlan, caller: Caller) -> None:
        """Makes what an admitted request wants and `find` did not find.

        Raises:
            RequestRefusedError: if its images have too many pixels in all.
            DeadlinePassedError: if a variant was not finished by the caller's deadline.
        """
        if plan.left and self._store is not None:
            await self._store.room()
        embeddings = await self._embed(plan, caller)
        self._find_in_memory(plan)  # while the sources were embedded, another request may have made the same variants
        rows: dict[int, Row] = {}
        for position, item in list(plan.left.items()):
            embedding = embeddings[item.source]
            if isinstance(embedding, Failure):
                plan.answer(position, embedding)
            else:
                settled = self.engine.settle(item.settings, embedding, item.seed)
                rows[position] = Row(item.name, embedding, item.seed, settled, item.key)
        made = await self.batcher.submit(list(rows.values()), caller)
        for position, result in zip(rows, made, strict=True):
            if isinstance(result, MadeImage):
                plan.answer(position, ReadyVariant(result.image, pb.ORIGIN_GENERATED, result.shared))
                plan.device_seconds += result.seconds
            elif isinstance(result, DeadlinePassedError):
                raise DeadlinePassedError(str(result))  # not itself: its traceback would lead back to `made`
            else:
                message = str(result) or "the generator failed; see the server's log"
                plan.answer(position, Failure(pb.ITEM_CODE_GENERATOR_FAILED, message))

    async def close(self) -> None:
        """Stops the queue and the conditioner."""
        await self.batcher.close()
        await self._embedder.close()

    # What the batcher tells -------------------------------------------------------------------------------------------

    def batch_done(self, report: BatchReport) -> None:
        """Counts a batch, and the draws that drift guards added."""
        self.counters.batch_done(report)
        self.counters.redrawn.inc(self.engine.redrawn - self._redrawn)
        self._redrawn = self.engine.redrawn

    def rows_dropped(self, rows: int, reason: DropReason) -> None:
        """Counts rows that nobody wants any more."""
        self.counters.dropped.inc(rows)

    def image_made(self, row: Row, image: UInt8Array) -> None:
        """Remembers a variant that was made, whether or not its client is still there."""
        if row.key is None:
            return
        self._memory.put(row.name, image)
        if self._store is not None:
            self._store.put_soon(row.key, image)

    # ------------------------------------------------------------------------------------------------------------------

    def _requested(
        self, request: pb.GenerateVariantsRequest, spec: pb.VariantSpec, settings: Settings
    ) -> RequestedVariant | Failure:
        if spec.source_index >= len(request.sources):
            sources = counted(len(request.sources), "source")
            message = f"source_index {spec.source_index} is beyond the {sources} of the request"
            return Failure(pb.ITEM_CODE_BAD_SPEC, message)
        digest = request.sources[spec.source_index].digest
        if len(digest) != 16:
            message = f"a source's digest has 16 bytes (BLAKE2b-128), not {len(digest)}"
            return Failure(pb.ITEM_CODE_DIGEST_MISMATCH, message)
        if spec.parameters:
            try:
                settings = self.settings(merge(request.parameters, spec.parameters))
            except RequestRefusedError as error:
                return Failure(pb.ITEM_CODE_BAD_SPEC, str(error))
        key = VariantKey(digest, self.engine.generator.spec.fingerprint, settings.digest, spec.variant_index)
        if spec.HasField("seed"):
            return RequestedVariant(spec.source_index, key.digest_with_seed(spec.seed), spec.seed, settings, None)
        return RequestedVariant(spec.source_index, key.digest(), key.seed(), settings, key)

    def _find_in_memory(self, plan: RequestPlan) -> None:
        for position, item in list(plan.left.items()):
            image = None if item.key is None else self._memory.get(item.name)
            if image is not None:
                plan.answer(position, ReadyVariant(image, pb.ORIGIN_MEMORY))

    async def _embed(self, plan: RequestPlan, caller: Caller) -> dict[int, torch.Tensor | Failure]:
        """Returns the embedding of each source that variants are left of, or why there is none."""
        sources = plan.sources
        found: dict[int, torch.Tensor | Failure] = {}
        unknown: dict[int, pb.SourceImage] = {}
        for position in sorted({item.source for item in plan.left.values()}):
            known = self._embedder.get(sources[position].digest)
            if known is not None:
                found[position] = known
            elif sources[position].data:
                unknown[position] = sources[position]
            else:
                plan.missing.append(sources[position].digest)
                message = "the server does not know this source; send its data"
                found[position] = Failure(pb.ITEM_CODE_SOURCE_MISSING, message)
        if not unknown:
            return found
        limits, submitter = self._file.limits, caller.submitter
        decoded, most_pixels = await decode_sources(unknown, self.engine, limits, self._codec, submitter)
        self._warn_of(most_pixels)
        images: dict[bytes, UInt8Array] = {}
        for position, image in decoded.items():
            if isinstance(image, Failure):
                found[position] = image
            else:
                images[sources[position].digest] = image
        embeddings, seconds = await self._embedder.embed(images, submitter)
        plan.device_seconds += seconds
        for position in unknown.keys() - found.keys():
            embedding = embeddings[sources[position].digest]
            found[position] = (
                Failure(pb.ITEM_CODE_GENERATOR_FAILED, str(embedding))
                if isinstance(embedding, GenerationFailedError)
                else embedding
            )
        return found

    def _warn_of(self, pixels: int) -> None:
        """Warns, once, of sources with so many pixels that a built-in generator cannot have been trained on them."""
        spec = self.engine.generator.spec
        if not self._warned and pixels > spec.image_size**2 and trained_on(spec.model) is not None:
            self._warned = True
            log.warning(
                foreign_data(spec.model, f"images of {pixels:,} pixels come, its own have {spec.image_size**2}")
            )
