"""Where finished variants stay: in memory, and in a store that is written behind the answers."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from genssl.data.base import UInt8Array
from genssl.variants.key import VariantKey
from genssl.variants.store.manifest import StoredGenerator
from genssl.variants.store.store import VariantStore
from genssl.variants.store.writers import StoreState

if TYPE_CHECKING:
    from genssl.generators.base import GeneratorSpec  # which imports torch

log = logging.getLogger(__name__)

# What may wait to be written. Beyond it new requests wait for the disk: memory stays bounded, and nothing is lost.
BACKLOG_BYTES = 64 * 2**20
Digest = bytes  # the class has a property of the name `bytes`
# What an image takes beside its pixels: array object, 16 bytes of digest in theirs, dictionary entry, links of the
# order. Measured by tracemalloc (numpy 2, Python 3.11): 268 to 296 bytes, as full as the dictionary's table is.
ENTRY_BYTES = 280


class MemoryCache:
    """Images by digest, least recently used dropped first, in `max_bytes` with what holds them. For one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._images: OrderedDict[Digest, UInt8Array] = OrderedDict()

    def get(self, digest: Digest) -> UInt8Array | None:
        """Returns the image uint8 [C, h, w] as it was put, which must not be changed, or None."""
        image = self._images.get(digest)
        if image is not None:
            self._images.move_to_end(digest)
        return image

    def put(self, digest: Digest, image: UInt8Array) -> None:
        """Keeps an image uint8 [C, h, w] without changing it later; one larger than the whole cache is not kept."""
        taken = image.nbytes + ENTRY_BYTES
        if taken > self._max_bytes:
            return
        if image.base is not None:
            # A row of a batch would hold the whole batch in memory, uncounted.
            image = image.copy()
        held = self._images.pop(digest, None)
        self._bytes += taken - (0 if held is None else held.nbytes + ENTRY_BYTES)
        self._images[digest] = image
        while self._bytes > self._max_bytes:
            self._bytes -= self._images.popitem(last=False)[1].nbytes + ENTRY_BYTES

    def __len__(self) -> int:
        return len(self._images)

    @property
    def bytes(self) -> int:
        """Memory taken now."""
        return self._bytes


class WriteThrough:
    """A store behind a server, closed by `close`. Lives on one event loop; two threads of its own touch the disk."""

    def __init__(self, store: VariantStore) -> None:
        self._store = store
        # A read must not wait for a commit, which waits for the disk.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="genssl-store-reader")
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="genssl-store-writer")
        self._backlog: list[tuple[VariantKey, UInt8Array]] = []
        self._backlog_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._writer: asyncio.Task[None] | None = None

    @property
    def state(self) -> StoreState:
        """What becomes of variants that are to be stored now."""
        return self._store.state

    def refresh(self) -> None:
        """Looks whether the store still lies in its place, so that its loss is told though nothing is written."""
        self._store.look()

    async def describe(self, spec: GeneratorSpec) -> None:
        """Enters a generator in the store's manifest."""
        described = StoredGenerator(name=spec.name, model=spec.model, licence=spec.licence, tflops=spec.tflops)
        await asyncio.get_running_loop().run_in_executor(
            self._writer_thread, self._store.describe_generator, spec.fingerprint, described
        )

    async def get(self, names: Sequence[bytes]) -> dict[bytes, UInt8Array]:
        """Returns those of the named variants that are stored, uint8 [3, h, w]."""
        images = await asyncio.get_running_loop().run_in_executor(self._reader, self._store.get_many, names)
        return {name: image for name, image in zip(names, images, strict=True) if image is not None}

    def put_soon(self, key: VariantKey, image: UInt8Array) -> None:
        """Takes a variant to be written, and returns at once; see `room`."""
        self._backlog.append((key, image))
        self._backlog_bytes += image.nbytes
        if self._backlog_bytes > BACKLOG_BYTES:
            self._room.clear()
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def room(self) -> None:
        """Returns once the disk is not far behind; whoever wants more to be made waits here first."""
        await self._room.wait()

    async def close(self) -> None:
        """Writes what waits, and closes the store."""
        if self._writer is not None:
            await self._writer
        await asyncio.get_running_loop().run_in_executor(self._writer_thread, self._store.close)
        self._reader.shutdown()
        self._writer_thread.shutdown()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._backlog:
                items, self._backlog, self._backlog_bytes = self._backlog, [], 0
                try:
                    await loop.run_in_executor(self._writer_thread, self._store.put_many, items)
                except Exception:  # a store that fails must not take the server with it
                    log.exception("%d variants were not stored", len(items))
                if self._backlog_bytes <= BACKLOG_BYTES:
                    self._room.set()
        finally:
            self._writer = None
            self._room.set()
