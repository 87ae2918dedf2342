"""One generator on a server: what was made is found again, what is missing is embedded and made."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

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
from genssl.server.batching.jobs import DeadlinePassedError, Made, Spent
from genssl.server.cache import WriteThrough
from genssl.server.codec import Failure, Ready, check_source, decode_source
from genssl.server.codec_pool import CodecPool, Turn
from genssl.server.memory import MemoryCache
from genssl.server.statistics import GeneratorCounters
from genssl.variants.engine import Row, Settings, VariantEngine
from genssl.variants.key import VariantKey

log = logging.getLogger(__name__)

SIZES = ("image_size", "output_size")  # parameters that say how many pixels are made
KEPT_SETTINGS = 64  # parameter mappings whose digests are remembered; a run uses one or two


@dataclass(frozen=True)
class Caller(Turn):
    """Who asks, how urgently, and until when (event loop time; None: no deadline); and what it has cost so far."""

    deadline: float | None = None
    spent: Spent = field(default_factory=Spent)


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        items: one a specification, in order.
        missing: digests of sources that must be sent with their data.
        device_seconds: this request's share of the device's time.
    """

    items: list[Ready | Failure]
    missing: list[bytes]
    device_seconds: float


@dataclass(frozen=True, eq=False)
class Wanted:
    """A specification that makes sense: the variant's name, and what its row will be made of.

    Attributes:
        source: position in the request's sources.
        name: 16 bytes, see `Row.name`.
        seed: of the noise.
        settings: of this variant.
        key: None if the client chose the seed.
    """

    source: int
    name: bytes
    seed: int
    settings: Settings
    key: VariantKey | None


class Hosted:
    """A generator with its queue, its embeddings, and the variants it has made.

    Args:
        generator_id: the name by which requests ask for it.
        engine: makes its variants.
        batcher: its queue.
        embedder: its conditioner.
        memory: finished variants; all generators of a server share it.
        store: the server's store, or None.
        counters: its part of the server's statistics.
        file: for the limits.
        codec: where images are decoded.
    """

    def __init__(
        self,
        generator_id: str,
        engine: VariantEngine,
        *,
        batcher: Batcher,
        embedder: Embedder,
        memory: MemoryCache,
        store: WriteThrough | None,
        counters: GeneratorCounters,
        file: ServerFile,
        codec: CodecPool,
    ) -> None:
        self.generator_id, self.engine, self.batcher, self.counters = generator_id, engine, batcher, counters
        self._embedder, self._memory, self._store = embedder, memory, store
        self._file, self._codec, self._warned = file, codec, False
        self._settings: dict[tuple[tuple[str, float], ...], Settings] = {}
        self.source_bytes = engine.generator.preprocess(np.zeros((3, 8, 8), np.uint8)).nbytes  # of one that is decoded

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

    def _warn_of(self, pixels: int) -> None:
        """Warns, once, of sources with so many pixels that a built-in generator cannot have been trained on them."""
        spec = self.engine.generator.spec
        if not self._warned and pixels > spec.image_size**2 and trained_on(spec.model) is not None:
            self._warned = True
            log.warning(
                foreign_data(spec.model, f"images of {pixels:,} pixels come, its own have {spec.image_size**2}")
            )

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

    def read(self, request: pb.GenerateVariantsRequest, settings: Settings) -> list[Wanted | Failure]:
        """Returns what each specification of a request wants; `settings` are those of the request's own parameters."""
        return [self._wanted(request, spec, settings) for spec in request.variants]

    async def find(self, wanted: Sequence[Wanted | Failure]) -> dict[bytes, Ready]:
        """Returns by name those of the wanted variants that were made before, from memory or the store."""
        names = {item.name for item in wanted if isinstance(item, Wanted) and item.key is not None}
        found = self._in_memory(names)
        if self._store is not None and len(found) < len(names):
            for name, image in (await self._store.get([name for name in names if name not in found])).items():
                found[name] = Ready(image, pb.ORIGIN_STORE)
                self._memory.put(name, image)
        return found

    async def make(
        self,
        request: pb.GenerateVariantsRequest,
        wanted: Sequence[Wanted | Failure],
        found: Mapping[bytes, Ready],
        caller: Caller,
    ) -> Outcome:
        """Makes what an admitted request wants and `find` did not find.

        Raises:
            RequestRefusedError: if its images have too many pixels in all.
            DeadlinePassedError: if a variant was not finished by the caller's deadline.
        """
        items: dict[int, Ready | Failure] = {}
        for position, item in enumerate(wanted):
            if isinstance(item, Failure):
                items[position] = item
            elif item.name in found:
                items[position] = found[item.name]
        left = {
            position: item for position, item in enumerate(wanted) if position not in items and isinstance(item, Wanted)
        }
        if left and self._store is not None:
            await self._store.room()
        needed = sorted({item.source for item in left.values()})
        embeddings, missing, device_seconds = await self._embed(request.sources, needed, caller)
        # While the sources were embedded, another request may have made the same variants.
        meanwhile = self._in_memory({item.name for item in left.values() if item.key is not None})
        rows: dict[int, Row] = {}
        for position, item in left.items():
            embedding = embeddings[item.source]
            if item.name in meanwhile:
                items[position] = meanwhile[item.name]
            elif isinstance(embedding, Failure):
                items[position] = embedding
            else:
                settled = self.engine.settle(item.settings, embedding, item.seed)
                rows[position] = Row(item.name, embedding, item.seed, settled, item.key)
        made = await self.batcher.submit(
            list(rows.values()),
            priority=caller.priority,
            client=caller.client,
            holder=caller.holder,
            deadline=caller.deadline,
            spent=caller.spent,
        )
        for position, one in zip(rows, made, strict=True):
            if isinstance(one, Made):
                items[position] = Ready(one.image, pb.ORIGIN_GENERATED, one.shared)
                device_seconds += one.seconds
            elif isinstance(one, DeadlinePassedError):
                raise DeadlinePassedError(str(one))  # not itself: its traceback would lead back to `made`
            else:
                items[position] = Failure(
                    pb.ITEM_CODE_GENERATOR_FAILED, str(one) or "the generator failed; see the server's log"
                )
        return Outcome([items[position] for position in range(len(wanted))], missing, device_seconds)

    def keep(self, row: Row, image: UInt8Array) -> None:
        """Remembers a variant that was made, whether or not its client is still there."""
        if row.key is None:
            return
        self._memory.put(row.name, image)
        if self._store is not None:
            self._store.put_soon([(row.key, image)])

    async def close(self) -> None:
        """Stops the queue and the conditioner."""
        await self.batcher.close()
        await self._embedder.close()

    def _wanted(
        self, request: pb.GenerateVariantsRequest, spec: pb.VariantSpec, settings: Settings
    ) -> Wanted | Failure:
        if spec.source_index >= len(request.sources):
            return Failure(
                pb.ITEM_CODE_BAD_SPEC,
                f"source_index {spec.source_index} is beyond the "
                f"{counted(len(request.sources), 'source')} of the request",
            )
        digest = request.sources[spec.source_index].digest
        if len(digest) != 16:
            return Failure(
                pb.ITEM_CODE_DIGEST_MISMATCH, f"a source's digest has 16 bytes (BLAKE2b-128), not {len(digest)}"
            )
        if spec.parameters:
            try:
                settings = self.settings(merge(request.parameters, spec.parameters))
            except RequestRefusedError as error:
                return Failure(pb.ITEM_CODE_BAD_SPEC, str(error))
        key = VariantKey(digest, self.engine.generator.spec.fingerprint, settings.digest, spec.variant_index)
        if spec.HasField("seed"):
            return Wanted(spec.source_index, key.digest_with_seed(spec.seed), spec.seed, settings, None)
        return Wanted(spec.source_index, key.digest(), key.seed(), settings, key)

    def _in_memory(self, names: set[bytes]) -> dict[bytes, Ready]:
        found = {}
        for name in names:
            image = self._memory.get(name)
            if image is not None:
                found[name] = Ready(image, pb.ORIGIN_MEMORY)
        return found

    async def _embed(
        self, sources: Sequence[pb.SourceImage], needed: Sequence[int], caller: Caller
    ) -> tuple[dict[int, torch.Tensor | Failure], list[bytes], float]:
        """Returns each needed source's embedding or why there is none, digests to be sent with data, device seconds."""
        found: dict[int, torch.Tensor | Failure] = {}
        missing: list[bytes] = []
        unknown: list[int] = []
        for position in needed:
            known = self._embedder.get(sources[position].digest)
            if known is not None:
                found[position] = known
            elif sources[position].data:
                unknown.append(position)
            else:
                missing.append(sources[position].digest)
                found[position] = Failure(
                    pb.ITEM_CODE_SOURCE_MISSING, "the server does not know this source; send its data"
                )
        self.counters.embeddings_reused = self._embedder.hits
        if not unknown:
            return found, missing, 0.0
        images = await self._decode({position: sources[position] for position in unknown}, found, caller)
        embeddings, seconds = await self._embedder.embed(
            images, caller.priority, client=caller.client, holder=caller.holder
        )
        for position in unknown:
            if position in found:
                continue
            embedding = embeddings[sources[position].digest]
            found[position] = (
                Failure(pb.ITEM_CODE_GENERATOR_FAILED, str(embedding))
                if isinstance(embedding, BaseException)
                else embedding
            )
        return found, missing, seconds

    async def _decode(
        self, sources: Mapping[int, pb.SourceImage], failed: dict[int, torch.Tensor | Failure], turn: Turn
    ) -> dict[bytes, UInt8Array]:
        """Returns preprocessed sources uint8 [3, S, S] by digest; enters those that cannot be decoded in `failed`."""
        limits = self._file.limits
        check, decode = partial(check_source, limits=limits), partial(decode_source, engine=self.engine, limits=limits)
        # Hashing and reading a header are charged by the bytes, three of which are about as much work as a pixel.
        sizes = [source.ByteSize() // 3 for source in sources.values()]
        checked = await self._codec.map(turn, check, list(sources.values()), sizes)
        pixels = {}
        for position, found in zip(sources, checked, strict=True):
            if isinstance(found, Failure):
                failed[position] = found
            else:
                pixels[position] = found
        self._warn_of(max(pixels.values(), default=0))
        if (total := sum(pixels.values())) > limits.max_request_pixels:
            raise RequestRefusedError(
                f"the request's {len(pixels)} images have {total:,} pixels in all; the limit is "
                f"{limits.max_request_pixels:,} (limits.max_request_pixels); send fewer at once, or smaller ones"
            )
        decoded = await self._codec.map(turn, decode, [sources[position] for position in pixels], list(pixels.values()))
        images: dict[bytes, UInt8Array] = {}
        for position, image in zip(pixels, decoded, strict=True):
            if isinstance(image, Failure):
                failed[position] = image
            else:
                images[sources[position].digest] = image
        return images
