"""The prefetch queue: asks for the variants of coming steps on the process's background loop.

The queue knows nothing of servers; it is given a `Fetcher`. What it holds back is cut into pieces only when a piece may
be sent, so that the choice of what to ask for next is never older than it must be.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Coroutine, Sequence
from itertools import islice

from genssl.base.wording import counted
from genssl.errors import ServerUnavailableError
from genssl.variants.ledger import Ledger
from genssl.variants.prefetch.loop import Tasks
from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.source import Fetcher, Image, VariantRequest

Key = tuple[bytes, int]

POLL_SECONDS = 0.2
CLOSE_SECONDS = 5.0
BULK_IN_FLIGHT = 1  # pieces ahead of the plan: enough to keep an idle server busy, too few to hold up a busy one


class _Slot:
    """A variant that was announced: its future, how many announced steps still want it, and the last of them."""

    def __init__(self) -> None:
        self.future: concurrent.futures.Future[Image] = concurrent.futures.Future()
        self.wanted = 0
        self.last_step = 0

    @property
    def arrived(self) -> bool:
        """Says whether the variant is there, neither under way nor failed."""
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None


class PrefetchQueue:
    """Keeps requests under way, bounded in number, and joins their results when a step takes them.

    The caller bounds how much is held by how many steps it announces ahead; see `prefetch.depth`.

    Args:
        fetcher: gets the variants, at most `rows_per_request` at a time.
        rows_per_request: no piece has more variants than this.
        max_in_flight: pieces under way at once.
        deadline_seconds: how long `take` waits, and for how long `take_ready` goes without any variant at all.
        newest_first: asks first for the step farthest ahead. A server that is too slow for every step then works for
            steps still to come; in plan order it would always be busy with those that have just passed.
        ledger: gets latencies, and what was dropped or generated ahead.
        pool: gets, in a thread, all that arrives, after it was handed to those who wait.

    Attributes:
        step: the last one that was taken without waiting.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        *,
        rows_per_request: int,
        max_in_flight: int,
        deadline_seconds: float,
        newest_first: bool = False,
        ledger: Ledger | None = None,
        pool: VariantPool | None = None,
    ) -> None:
        self.fetcher, self.rows_per_request, self.step = fetcher, rows_per_request, 0
        self._max_in_flight, self._deadline, self._newest_first = max_in_flight, deadline_seconds, newest_first
        self._ledger, self._pool = ledger or Ledger(), pool
        self._tasks = Tasks()
        self._closed = False
        # Guards what follows: the trainer's thread announces and takes, the loop's thread sends and receives.
        self._lock = threading.Lock()
        self._slots: dict[Key, _Slot] = {}
        self._unsent: dict[int, dict[Key, VariantRequest]] = {}
        self._bulk: dict[Key, VariantRequest] = {}
        self._in_flight = self._bulk_in_flight = 0
        self._hungry_since: float | None = None  # since when something is under way and nothing has come
        self._failure: BaseException | None = None

    def run_first(self, setup: Coroutine[None, None, None]) -> None:
        """Runs a coroutine on the loop first, such as opening a channel, as long as the fetcher's `check` lets it."""
        future = self._tasks.start(setup)
        try:
            while not future.done():
                concurrent.futures.wait([future], timeout=POLL_SECONDS)
                self.fetcher.check()
        except BaseException:
            future.cancel()
            raise
        future.result()

    @property
    def idle(self) -> bool:
        """Says whether nothing that was announced or given to `refresh` is waiting to be sent."""
        return not self._unsent and not self._bulk

    def announce(self, requests: Sequence[VariantRequest], step: int = 0) -> None:
        """Starts fetching the variants of a step; those already announced are only counted once more."""
        with self._lock:
            for request in requests:
                slot = self._slots.get(request.key)
                if slot is None:
                    slot = self._slots[request.key] = _Slot()
                    self._unsent.setdefault(step, {})[request.key] = request
                    self._bulk.pop(request.key, None)
                slot.wanted += 1
                slot.last_step = max(slot.last_step, step)
        self._send()

    def refresh(self, requests: Sequence[VariantRequest]) -> None:
        """Fetches variants ahead of the plan, whenever nothing of the plan waits; they go to the pool alone."""
        with self._lock:
            for request in requests:
                if request.key not in self._slots:
                    self._bulk[request.key] = request
        self._send()

    def take(self, requests: Sequence[VariantRequest], step: int = 0) -> list[Image]:
        """Waits for announced variants and forgets them.

        Raises:
            ServerUnavailableError: if they are not there after `deadline_seconds`, or the fetcher says they never will.
        """
        self.announce([request for request in requests if not self._is_announced(request)], step)
        with self._lock:
            slots = [self._slots[request.key] for request in requests]
        self._wait([slot.future for slot in slots])
        images = [slot.future.result() for slot in slots]
        with self._lock:
            self._forget(requests)
        return images

    def take_ready(
        self, requests: Sequence[VariantRequest], step: int
    ) -> tuple[list[Image | None], list[VariantRequest]]:
        """Returns what is there of a step's variants, None for what is not, and the requests that were dropped unsent.

        The step, and all before it, have passed: what has not been asked for then is dropped; what is under way still
        goes to the pool.

        Raises:
            ServerUnavailableError: if nothing at all has come for `deadline_seconds`, or the fetcher says nothing will.
            RequestRefusedError: if the generator refused a request.
        """
        self.step = step
        self.fetcher.check()
        with self._lock:
            slots = [self._slots.get(request.key) for request in requests]
            found = [slot.future if slot is not None and slot.arrived else None for slot in slots]
            self._forget(requests)
            dropped = self._drop_passed(step)
            hungry = time.monotonic() - self._hungry_since if self._hungry_since is not None else 0.0
        self._send()
        if self._failure is not None:
            raise self._failure
        images = [future.result() if future is not None else None for future in found]
        if None in images and hungry > self._deadline:
            raise ServerUnavailableError(f"no variant at all has come for {hungry:.0f} s: {self.fetcher.describe()}")
        return images, dropped

    def close(self, teardown: Coroutine[None, None, None] | None = None) -> None:
        """Cancels what is under way, then runs `teardown` on the loop, such as closing a channel."""
        self._closed = True
        self._tasks.close(teardown, timeout=CLOSE_SECONDS)

    def _is_announced(self, request: VariantRequest) -> bool:
        slot = self._slots.get(request.key)  # one look-up, which needs no lock
        return slot is not None and slot.wanted > 0  # what is under way ahead of the plan is nobody's yet

    def _wait(self, futures: Sequence[concurrent.futures.Future[Image]]) -> None:
        started = time.monotonic()
        while True:
            # Short waits keep Ctrl-C quick and let `check` speak before the deadline.
            done, pending = concurrent.futures.wait(
                futures, timeout=POLL_SECONDS, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            failed = next((future for future in done if future.exception() is not None), None)
            if failed is not None:
                self.fetcher.check()  # that the server process has died says more than that it gives no answer
                failed.result()
            if not pending:
                return
            self.fetcher.check()
            if time.monotonic() - started > self._deadline:
                raise ServerUnavailableError(
                    f"{counted(len(pending), 'variant of this step was', 'variants of this step were')} "
                    f"still missing after {self._deadline:g} s: {self.fetcher.describe()}"
                )

    # ---- With the lock held ----

    def _forget(self, requests: Sequence[VariantRequest]) -> None:
        for request in requests:
            slot = self._slots.get(request.key)
            if slot is None:
                continue
            slot.wanted -= 1
            if slot.wanted <= 0 and slot.future.done():
                del self._slots[request.key]

    def _drop_passed(self, step: int) -> list[VariantRequest]:
        """Drops, and returns, what was not sent for steps up to `step`, unless a later step wants it too."""
        dropped = []
        for passed in [number for number in self._unsent if number <= step]:
            for key, request in self._unsent.pop(passed).items():
                slot = self._slots[key]
                if slot.last_step > step:
                    self._unsent.setdefault(slot.last_step, {})[key] = request
                else:
                    del self._slots[key]
                    dropped.append(request)
        self._ledger.variants_dropped += len(dropped)
        return dropped

    def _next_piece(self) -> tuple[list[VariantRequest], list[_Slot], bool] | None:
        """Picks what to send now, if anything may be, and counts it as under way."""
        bulk = not self._unsent
        if bulk:
            if not self._bulk or self._bulk_in_flight >= BULK_IN_FLIGHT:
                return None
            waiting = self._bulk
            self._bulk_in_flight += 1
        else:
            if self._in_flight >= self._max_in_flight:
                return None
            step = max(self._unsent) if self._newest_first else min(self._unsent)
            waiting = self._unsent[step]
            self._in_flight += 1
        piece = [waiting.pop(key) for key in list(islice(waiting, self.rows_per_request))]
        if not bulk and not waiting:
            del self._unsent[step]
        if self._hungry_since is None:
            self._hungry_since = time.monotonic()
        if bulk:  # a step may come to want what is under way ahead of the plan, so that has slots too
            self._slots.update({request.key: _Slot() for request in piece})
        slots = [self._slots[request.key] for request in piece]
        return piece, slots, bulk

    def _forget_unwanted(self, piece: Sequence[VariantRequest], slots: Sequence[_Slot]) -> None:
        for request, slot in zip(piece, slots, strict=True):
            # The step that took this slot has forgotten it; by now another may have announced the same variant anew.
            if slot.wanted <= 0 and self._slots.get(request.key) is slot:
                del self._slots[request.key]

    # ---- Sending and receiving ----

    def _send(self) -> None:
        while not self._closed:
            with self._lock:
                picked = self._next_piece()
            if picked is None:
                return
            try:
                self._tasks.start(self._fetch_piece(*picked))
            except RuntimeError:  # closed meanwhile
                return

    async def _fetch_piece(self, piece: list[VariantRequest], slots: list[_Slot], bulk: bool) -> None:
        started = time.monotonic()
        try:
            images = await self.fetcher.fetch(piece, ahead=bulk)
            if len(images) != len(piece):
                raise RuntimeError(f"{len(piece)} variants were fetched and {len(images)} came")
            with self._lock:  # no step may see a variant between its arrival and what is noted of it
                for slot, image in zip(slots, images, strict=True):
                    slot.future.set_result(image)
                if bulk:
                    self._ledger.variants_refreshed += len(piece)
                else:
                    self._ledger.fetch_seconds.append(time.monotonic() - started)
                self._hungry_since = time.monotonic()
                self._forget_unwanted(piece, slots)
            if self._pool is not None:
                names, pixels = [request.key for request in piece], [pixels for pixels, _ in images]
                await asyncio.to_thread(self._pool.add_many, names, pixels, self.step)
        except asyncio.CancelledError:
            for slot in slots:
                slot.future.cancel()
            raise
        except BaseException as error:
            with self._lock:
                if not isinstance(error, ServerUnavailableError):
                    # A later step hears of it, if its own has passed; of several the first, which may cause the others.
                    self._failure = self._failure or error
                for slot in slots:
                    if not slot.future.done():
                        slot.future.set_exception(error)
                self._forget_unwanted(piece, slots)
        finally:
            with self._lock:
                if bulk:
                    self._bulk_in_flight -= 1
                else:
                    self._in_flight -= 1
                if self._in_flight + self._bulk_in_flight == 0 and all(slot.arrived for slot in slots):
                    self._hungry_since = None
            self._send()
