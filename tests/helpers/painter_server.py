"""A generator that can be held, and the real service with it on a real port, in this event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import torch

from genssl.config.documents.document import parse_document
from genssl.config.server import ServerFile
from genssl.config.validate import validate
from genssl.data.base import UInt8Array, raw_image
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.generators.base import Alive, GeneratorSpec, keep_living
from genssl.generators.parameters import Parameters
from genssl.server.admission import Admission
from genssl.server.auth import TokenInterceptor, Tokens
from genssl.server.cache import MemoryCache
from genssl.server.hosted import Hosted
from genssl.server.service import GenerationService
from genssl.server.statistics import Statistics
from genssl.variants.engine import VariantEngine

BAD_SEED = 666
SOURCE = raw_image(np.full((3, 8, 8), 128, np.uint8))


class Clock:
    """Stands for the time: it moves only when told to, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Painter:
    """Paints each image in the grey that its seed gives; can be held, slow, short of memory or broken.

    Its parameter `kind` splits batches, `shade` does not.

    Attributes:
        gate: generation waits for it before every step.
        entered: set when a batch has begun.
        batches, shades: the seeds and shades of each batch begun, padding included.
        held_batch: the number of the batch, from 1, that shuts the gate before it begins, and then sets `held`.
    """

    def __init__(
        self,
        *,
        side: int = 2,
        steps: int = 1,
        memory: int = 10**6,
        fixed_seconds: float = 0.0,
        row_seconds: float = 0.0,
        clock: Clock | None = None,
    ) -> None:
        self.spec = GeneratorSpec("painter", "none", bytes(16), 4, side, "none", {"kind": 0, "shade": 0.0}, {})
        self.gate, self.entered, self.held = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()
        self.held_batch, self.steps_begun = 0, 0
        self.batches, self.shades = list[list[int]](), list[list[float]]()
        self.steps, self.memory, self.fixed_seconds, self.row_seconds = steps, memory, fixed_seconds, row_seconds
        self.clock = clock or Clock()

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        return image

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 4)

    def check(self, parameters: Parameters) -> None:
        pass

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        return (parameters["kind"],)

    def generate(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        self.batches.append(list(seeds))
        self.shades.append([row["shade"] for row in parameters])
        if len(self.batches) == self.held_batch:
            self.gate.clear()
            self.held.set()
        rows = list(range(len(seeds)))
        for _ in range(self.steps):
            if alive is not None and (kept := keep_living(alive(), rows, sizes)) is not None:
                rows = [rows[position] for position in kept]
            self.steps_begun += 1
            self.entered.set()
            assert self.gate.wait(20)
            self.clock.advance(self.fixed_seconds + self.row_seconds * len(seeds))
        if len(seeds) > self.memory:
            raise torch.OutOfMemoryError("tried to allocate more than there is")
        if BAD_SEED in seeds:
            raise ValueError("cannot paint this one")
        grey = torch.tensor([seed % 251 if row in rows else 0 for row, seed in enumerate(seeds)], dtype=torch.uint8)
        side = self.spec.image_size  # black where a row was given up
        return grey[:, None, None, None].expand(-1, 3, side, side).clone()


async def hold_device(painter: Painter | Any, submit: Callable[[], Any]) -> Any:
    """Occupies the device with what `submit` submits, until the painter's gate is opened; returns what it returns."""
    painter.gate.clear()
    painter.entered.clear()
    held = submit()
    assert await asyncio.to_thread(painter.entered.wait, 20)
    return held


async def settle() -> None:
    """Lets the event loop run all that is ready."""
    for _ in range(5):
        await asyncio.sleep(0)


@dataclass
class Serving:
    """A server of one painter."""

    painter: Painter
    service: GenerationService
    statistics: Statistics
    hosted: Hosted
    stub: Any

    def ask(self, first: int, count: int, *, token: str | None = None, **more: Any) -> Any:
        """Asks for `count` variants of one source; returns the call."""
        specs = [pb.VariantSpec(source_index=0, variant_index=first + number) for number in range(count)]
        timeout, fields = more.pop("timeout", None), {"variants": specs} | more
        source = pb.SourceImage(
            digest=SOURCE.source_id, data=SOURCE.data, encoding=pb.IMAGE_ENCODING_RAW, channels=3, height=8, width=8
        )
        request = pb.GenerateVariantsRequest(generator_id="painter", sources=[source], **fields)
        metadata = [("authorization", f"Bearer {token}")] if token else None
        return self.stub.GenerateVariants(request, timeout=timeout, metadata=metadata)

    async def hold(self, **whose: Any) -> Any:
        """Occupies the device with one row until the gate is opened; returns its call."""
        return await hold_device(self.painter, lambda: self.ask(10**6, 1, **whose))

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)


@asynccontextmanager
async def serving(settings: str = "") -> AsyncIterator[Serving]:
    """Runs a server; `settings` are lines of a server file."""
    text = f"buckets: [1, 4, 16]\ngenerators: [{{name: stable_unclip, model: m}}]\n{settings}"
    file = validate(ServerFile, parse_document(text, "server.yaml"))
    admission = Admission(file.limits)
    statistics = Statistics("cpu", file.buckets, queued_bytes=lambda: admission.num_bytes)
    service = GenerationService(file, "cpu", 1, admission, statistics)
    painter, device = Painter(side=8), ThreadPoolExecutor(1)
    hosted = Hosted(
        "painter",
        VariantEngine(painter, file.buckets),
        device,
        memory=MemoryCache(0),
        store=None,
        counters=statistics.register("painter"),
        file=file,
        codec=service.codec,
    )
    service.hosted, statistics.state = {"painter": hosted}, "serving"
    largest = file.limits.max_variants_per_request
    guards = [TokenInterceptor(Tokens(file.tokens, largest), statistics)] if file.tokens else []
    server = grpc.aio.server(interceptors=guards)
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Serving(painter, service, statistics, hosted, pb_grpc.GenerationServiceStub(channel))
    finally:
        painter.gate.set()
        await service.close()
        await server.stop(0)
        device.shutdown()
