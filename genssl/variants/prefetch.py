"""The prefetch queue: an asyncio loop in a background thread that asks for the variants of coming steps.

The queue knows nothing of servers; it is given a coroutine that fetches a list of requests. It belongs to the process
that made it: there must be one gRPC asyncio loop a process, and forked children must not touch it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence

import numpy as np

from genssl.data.base import UInt8Array
from genssl.errors import ServerUnavailableError
from genssl.variants.ledger import Origin
from genssl.variants.source import Delivery, VariantRequest

Image = tuple[UInt8Array, Origin]
Fetch = Callable[[Sequence[VariantRequest]], Awaitable[list[Image]]]
Key = tuple[bytes, int]

POLL_SECONDS = 0.2
CLOSE_SECONDS = 5.0


class _Slot:
    """A variant that was announced: its future, and how many announced steps still want it."""

    def __init__(self) -> None:
        self.future: concurrent.futures.Future[Image] = concurrent.futures.Future()
        self.wanted = 1


class PrefetchQueue:
    """Keeps requests under way, bounded in number, and joins their results when a step takes them.

    The caller bounds how much is held by how many steps it announces ahead; see `variants.prefetch_steps`.

    Args:
        fetch: fetches variants, at most `rows_per_request` at a time; raises when they cannot be had.
        rows_per_request: requests are cut into pieces of this many variants.
        max_in_flight: pieces under way at once.
        deadline_seconds: how long `take` waits.
        check: called now and then while `take` waits; raises when waiting is pointless (the server process has died).
        describe: says, for the error at the deadline, what is wrong with the source and what to do.
        teardown: a coroutine run last on the loop, such as closing a channel.
    """

    def __init__(
        self,
        fetch: Fetch,
        *,
        rows_per_request: int,
        max_in_flight: int,
        deadline_seconds: float,
        check: Callable[[], None] = lambda: None,
        describe: Callable[[], str] = lambda: "raise variants.deadline_seconds, or use a faster generator",
        teardown: Callable[[], Coroutine[None, None, None]] | None = None,
    ) -> None:
        self.rows_per_request = rows_per_request
        self._fetch, self._deadline = fetch, deadline_seconds
        self._check, self._describe, self._teardown = check, describe, teardown
        self._slots: dict[Key, _Slot] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._in_flight = asyncio.Semaphore(max_in_flight)
        self._thread = threading.Thread(target=self._loop.run_forever, name="genssl-prefetch", daemon=True)
        self._thread.start()
        self._closed = False

    def run_first(self, setup: Coroutine[None, None, None]) -> None:
        """Runs a coroutine on the loop first, such as opening a channel; closes the queue if it fails."""
        try:
            self._run(setup)
        except BaseException:
            self.close()
            raise

    def plan(self, requests: Sequence[VariantRequest]) -> None:
        """Starts fetching variants; those already announced are only counted once more."""
        new = []
        for request in requests:
            key = (request.source_id, request.index)
            if key in self._slots:
                self._slots[key].wanted += 1
            else:
                self._slots[key] = _Slot()
                new.append(request)
        for start in range(0, len(new), self.rows_per_request):
            piece = new[start : start + self.rows_per_request]
            slots = [self._slots[(request.source_id, request.index)] for request in piece]
            self._loop.call_soon_threadsafe(self._start, piece, slots)

    def take(self, requests: Sequence[VariantRequest]) -> Delivery:
        """Waits for announced variants and forgets them.

        Raises:
            ServerUnavailableError: if they are not there after `deadline_seconds`, or `check` says they never will be.
        """
        unannounced = [request for request in requests if (request.source_id, request.index) not in self._slots]
        self.plan(unannounced)
        slots = [self._slots[(request.source_id, request.index)] for request in requests]
        self._wait([slot.future for slot in slots])
        images = [slot.future.result() for slot in slots]
        for request, slot in zip(requests, slots, strict=True):
            slot.wanted -= 1
            if slot.wanted <= 0:
                self._slots.pop((request.source_id, request.index), None)
        return Delivery(images=np.stack([image for image, _ in images]), origins=[origin for _, origin in images])

    def close(self) -> None:
        """Cancels what is under way, ends the loop and its thread."""
        if self._closed:
            return
        self._closed = True
        try:
            self._run(self._cancel_all(), CLOSE_SECONDS)
            if self._teardown is not None:
                self._run(self._teardown(), CLOSE_SECONDS)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5)
            if not self._thread.is_alive():
                self._loop.close()

    def _wait(self, futures: Sequence[concurrent.futures.Future[Image]]) -> None:
        started = time.monotonic()
        while True:
            # Short waits keep Ctrl-C quick and let `check` speak before the deadline.
            done, pending = concurrent.futures.wait(
                futures, timeout=POLL_SECONDS, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            failed = next((future for future in done if future.exception() is not None), None)
            if failed is not None:
                self._check()  # that the server process has died says more than that it gives no answer
                failed.result()
            if not pending:
                return
            self._check()
            if time.monotonic() - started > self._deadline:
                raise ServerUnavailableError(
                    f"{len(pending)} variants of this step were still missing after {self._deadline:g} s: "
                    f"{self._describe()}"
                )

    def _start(self, piece: list[VariantRequest], slots: list[_Slot]) -> None:
        task = self._loop.create_task(self._fetch_piece(piece, slots))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch_piece(self, piece: list[VariantRequest], slots: list[_Slot]) -> None:
        try:
            async with self._in_flight:
                images = await self._fetch(piece)
        except asyncio.CancelledError:
            for slot in slots:
                slot.future.cancel()
            raise
        except BaseException as error:
            for slot in slots:
                slot.future.set_exception(error)
            return
        for slot, image in zip(slots, images, strict=True):
            slot.future.set_result(image)

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks(self._loop) - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _run(self, work: Coroutine[None, None, None], seconds: float = math.inf) -> None:
        """Runs a coroutine on the loop and waits for it, at most so many seconds."""
        ends = time.monotonic() + seconds
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not future.done():
            if time.monotonic() > ends:
                future.cancel()
                return
            concurrent.futures.wait([future], timeout=POLL_SECONDS)
            if not self._closed:
                self._check()
        future.result()
