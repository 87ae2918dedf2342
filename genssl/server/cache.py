"""A server's store: read before anything is made, written behind the answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from genssl.data.base import UInt8Array
from genssl.variants.key import VariantKey
from genssl.variants.store.manifest import StoredGenerator
from genssl.variants.store.store import VariantStore
from genssl.variants.store.writers import StoreState

log = logging.getLogger(__name__)

# What may wait to be written. Beyond it new requests wait for the disk: memory stays bounded, and nothing is lost.
BACKLOG_BYTES = 64 * 2**20


class WriteThrough:
    """A store behind a server. Lives on one event loop; the disk is touched by two threads of its own.

    Args:
        store: open for writing; closed by `close`.
    """

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

    async def describe(
        self, fingerprint: bytes, *, name: str, model: str, licence: str, tflops: float | None = None
    ) -> None:
        """Enters a generator in the store's manifest."""
        described = StoredGenerator(name=name, model=model, licence=licence, tflops=tflops)
        await asyncio.get_running_loop().run_in_executor(
            self._writer_thread, self._store.describe_generator, fingerprint, described
        )

    async def get(self, names: Sequence[bytes]) -> dict[bytes, UInt8Array]:
        """Returns those of the named variants that are stored, uint8 [3, h, w]."""
        images = await asyncio.get_running_loop().run_in_executor(self._reader, self._store.get_many, names)
        return {name: image for name, image in zip(names, images, strict=True) if image is not None}

    def put_soon(self, items: Sequence[tuple[VariantKey, UInt8Array]]) -> None:
        """Takes variants to be written, and returns at once; see `room`."""
        self._backlog += items
        self._backlog_bytes += sum(image.nbytes for _, image in items)
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
