"""Pixels in and out of messages: checks and decodes sources, builds variants, in threads.

A small piece of a request is worked on at a time, and their turns go round as rows' do.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from PIL import Image

from genssl.config.limits import LimitsConfig
from genssl.data.base import StoredImage, UInt8Array
from genssl.data.decode import TooManyPixelsError, count_pixels, decode
from genssl.errors import DataError, RequestRefusedError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.server.batching.schedule import Priority, Submitter
from genssl.server.batching.turns import Turns
from genssl.variants.engine import VariantEngine

# Below this, building the answer takes less time than handing it to another thread.
ENCODED_IN_PLACE_BYTES = 2**20
OUTPUT_ENCODINGS = (pb.IMAGE_ENCODING_RAW, pb.IMAGE_ENCODING_PNG)
# Small images share a task: handing one over takes as long as decoding a thousand pixels or so.
TASK_PIXELS = 2**18
RISING_AT_ONCE = 64  # tasks, in one call
# What each image costs beside its pixels, in pixels.
IMAGE_PIXELS = 1024

_OK = pb.ItemStatus(code=pb.ITEM_CODE_OK)

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Why an item cannot be served; `message` is for the client's user."""

    code: pb.ItemCode
    message: str


@dataclass(frozen=True)
class ReadyVariant:
    """A variant uint8 [3, h, w], where it came from, and whether it was computed for another request."""

    image: UInt8Array
    origin: pb.Origin
    shared: bool = False


def check_source(source: pb.SourceImage, limits: LimitsConfig) -> int | Failure:
    """Checks one source as far as that goes without decoding it; returns how many pixels it says it has."""
    if source.encoding not in (pb.IMAGE_ENCODING_RAW, pb.IMAGE_ENCODING_FILE):
        return Failure(pb.ITEM_CODE_BAD_IMAGE, "a source's encoding must be RAW or FILE")
    stored = _stored(source)
    if len(stored.data) > limits.max_image_bytes:  # before it is hashed
        return Failure(
            pb.ITEM_CODE_BAD_IMAGE,
            f"the image has {len(stored.data):,} bytes; the limit is {limits.max_image_bytes:,} "
            "(limits.max_image_bytes of the server file)",
        )
    # Checked here and not believed: a wrong digest would poison embeddings, cache and store for other clients.
    if stored.source_id != source.digest:
        return Failure(
            pb.ITEM_CODE_DIGEST_MISMATCH, f"the data has the digest {stored.source_id.hex()}, not {source.digest.hex()}"
        )
    try:
        return count_pixels(stored, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
    except DataError as error:
        return _bad_image(error)


def decode_source(source: pb.SourceImage, engine: VariantEngine, limits: LimitsConfig) -> UInt8Array | Failure:
    """Decodes and preprocesses one source that was checked, to uint8 [3, S, S]."""
    try:
        return engine.generator.preprocess(
            decode(_stored(source), max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels)
        )
    except DataError as error:
        return _bad_image(error)


def _bad_image(error: DataError) -> Failure:
    setting = " (limits.max_image_pixels of the server file)" if isinstance(error, TooManyPixelsError) else ""
    return Failure(pb.ITEM_CODE_BAD_IMAGE, f"{error}{setting}")


def _stored(source: pb.SourceImage) -> StoredImage:
    return StoredImage(
        data=source.data,
        encoding="raw" if source.encoding == pb.IMAGE_ENCODING_RAW else "file",
        channels=source.channels,
        height=source.height,
        width=source.width,
    )


async def decode_sources(
    sources: Mapping[int, pb.SourceImage],
    engine: VariantEngine,
    limits: LimitsConfig,
    pool: CodecPool,
    submitter: Submitter,
) -> tuple[dict[int, UInt8Array | Failure], int]:
    """Returns preprocessed sources uint8 [3, S, S] or why they cannot be decoded, and the pixels of the largest one.

    Raises:
        RequestRefusedError: if they have too many pixels in all.
    """
    found: dict[int, UInt8Array | Failure] = {}
    check, decode = partial(check_source, limits=limits), partial(decode_source, engine=engine, limits=limits)
    # Hashing and reading a header are charged by the bytes, three of which are about as much work as a pixel.
    sizes = [source.ByteSize() // 3 for source in sources.values()]
    checked = await pool.map(submitter, check, list(sources.values()), sizes)
    pixels: dict[int, int] = {}
    for position, result in zip(sources, checked, strict=True):
        if isinstance(result, Failure):
            found[position] = result
        else:
            pixels[position] = result
    if (total := sum(pixels.values())) > limits.max_request_pixels:
        raise RequestRefusedError(
            f"the request's {len(pixels)} images have {total:,} pixels in all; the limit is "
            f"{limits.max_request_pixels:,} (limits.max_request_pixels); send fewer at once, or smaller ones"
        )
    decoded = await pool.map(submitter, decode, [sources[position] for position in pixels], list(pixels.values()))
    found.update(zip(pixels, decoded, strict=True))
    return found, max(pixels.values(), default=0)


async def encode_variants(
    items: Sequence[ReadyVariant | Failure], encoding: pb.ImageEncoding, pool: CodecPool, submitter: Submitter
) -> list[pb.Variant]:
    """Returns one message an item, in order, RAW unless told otherwise; what takes long is done in the pool."""
    encoding = encoding or pb.IMAGE_ENCODING_RAW
    encode = partial(_variant, encoding=encoding)
    pixels = [item.image.size // 3 if isinstance(item, ReadyVariant) else 0 for item in items]
    if encoding == pb.IMAGE_ENCODING_RAW and 3 * sum(pixels) < ENCODED_IN_PLACE_BYTES:
        variants = [encode(item) for item in items]
    else:
        variants = await pool.map(submitter, encode, items, pixels)
    for position, variant in enumerate(variants):
        variant.spec_index = position
    return variants


def _variant(item: ReadyVariant | Failure, encoding: pb.ImageEncoding) -> pb.Variant:
    if isinstance(item, Failure):
        return pb.Variant(status=pb.ItemStatus(code=item.code, message=item.message))
    channels, height, width = item.image.shape
    return pb.Variant(
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


@dataclass(slots=True, eq=False)
class _Task:
    function: Callable[[], Any] | None  # None once it has ended: a dead task in the queue must not hold images
    cost: int
    submitter: Submitter
    lane: Priority
    since: float
    answer: asyncio.Future[Any] = field(repr=False)


class CodecPool:
    """Runs the codec's tasks. Lives on one event loop.

    Args:
        executor: runs them.
        threads: how many may run at once.
        most_pixels: how many may be worked on at once; a larger task runs alone.
        ageing_seconds: a task that has waited so long rises by one class, and again after each further such time.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        threads: int,
        most_pixels: int,
        ageing_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor, self._threads, self._most_pixels = executor, threads, most_pixels
        self._ageing_seconds, self._clock = ageing_seconds, clock
        self._lanes: dict[Priority, Turns[_Task]] = {priority: Turns() for priority in Priority}
        self._arrivals: dict[Priority, dict[_Task, None]] = {priority: {} for priority in Priority}
        self._running = self._pixels = 0

    async def map(
        self, submitter: Submitter, function: Callable[[Item], Result], items: Sequence[Item], pixels: Sequence[int]
    ) -> list[Result]:
        """Returns the function's results in order; what has not begun when the caller is cancelled never does.

        The pixels of an item are what it costs, and what counts towards those worked on at once.
        """
        parts: list[list[Item]] = []
        costs: list[int] = []
        for item, count in zip(items, pixels, strict=True):
            cost = count + IMAGE_PIXELS
            if not parts or costs[-1] + cost > TASK_PIXELS:
                parts.append([])
                costs.append(0)
            parts[-1].append(item)
            costs[-1] += cost
        answers = [
            self._add(submitter, partial(_each, function, part), cost) for part, cost in zip(parts, costs, strict=True)
        ]
        self._start()
        return [result for part in await asyncio.gather(*answers) for result in part]

    def _add(self, submitter: Submitter, function: Callable[[], Any], cost: int) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        task = _Task(function, cost, submitter, submitter.priority, self._clock(), answer)
        answer.add_done_callback(lambda _: self._leave(task))
        self._enter(task)
        return answer

    def _enter(self, task: _Task) -> None:
        self._lanes[task.lane].add(task.submitter.holder, task.submitter.client, task)
        self._arrivals[task.lane][task] = None

    def _leave(self, task: _Task) -> None:
        task.function = None
        self._arrivals[task.lane].pop(task, None)

    def _start(self) -> None:
        """Starts tasks, in their turn, while there is room."""
        while self._running < self._threads and (task := self._take()):
            assert task.function is not None, "it was wanted a moment ago"
            self._running += 1
            self._pixels += task.cost
            running = asyncio.get_running_loop().run_in_executor(self._executor, task.function)
            running.add_done_callback(partial(self._ended, task))

    def _take(self) -> _Task | None:
        """Takes out the task that goes next; one for which there is no room lets smaller ones of others pass."""
        self._age()
        for lane, turns in self._lanes.items():
            while taken := turns.take(lambda task, lane=lane: self._gone(task, lane) or self._fits(task)):  # type: ignore[misc]
                holder, client, task = taken
                if not self._gone(task, lane):
                    turns.charge(holder, client, task.cost)
                    del self._arrivals[lane][task]
                    return task
        return None

    def _gone(self, task: _Task, lane: Priority) -> bool:
        return task.function is None or task.lane != lane

    def _fits(self, task: _Task) -> bool:
        return not self._running or self._pixels + task.cost <= self._most_pixels

    def _age(self) -> None:
        now = self._clock()
        for lane in (Priority.TRAINING, Priority.BULK):
            for task in list(islice(self._arrivals[lane], RISING_AT_ONCE)):
                if task.since + self._ageing_seconds > now:
                    break
                del self._arrivals[lane][task]
                task.lane, task.since = Priority(lane - 1), now
                self._enter(task)  # it stays in its old place too, where it is passed over

    def _ended(self, task: _Task, running: asyncio.Future[Any]) -> None:
        self._running -= 1
        self._pixels -= task.cost
        if not task.answer.done():
            if running.cancelled():
                task.answer.cancel()
            elif error := running.exception():
                task.answer.set_exception(error)
            else:
                task.answer.set_result(running.result())
        elif not running.cancelled():
            running.exception()  # nobody is there to be told
        self._start()


def _each(function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    return [function(item) for item in items]
