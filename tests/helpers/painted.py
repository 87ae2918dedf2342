"""The real service on a real port, in this event loop, with a generator that can be held."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import torch

from genssl.config.document import parse_document
from genssl.config.load import validate
from genssl.config.server import ServerFile
from genssl.data.base import UInt8Array, raw_image
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.generators.base import Alive, GeneratorSpec
from genssl.generators.parameters import Parameters
from genssl.server.admission import Admission
from genssl.server.auth import TokenInterceptor, Tokens
from genssl.server.batching.batcher import Batcher
from genssl.server.batching.embedder import Embedder
from genssl.server.hosted import Hosted
from genssl.server.memory import MemoryCache
from genssl.server.service import GenerationService
from genssl.server.statistics import Statistics
from genssl.variants.engine import VariantEngine

SOURCE = raw_image(np.full((3, 8, 8), 128, np.uint8))


class Painter:
    """Paints black images; waits for its gate first. Its parameter `kind` splits batches, `shade` does not.

    Attributes:
        shades: those of each batch begun, padding included.
    """

    def __init__(self) -> None:
        self.spec = GeneratorSpec("painter", "none", bytes(16), 4, 8, "none", {"kind": 0, "shade": 0.0}, {})
        self.gate, self.entered, self.shades = threading.Event(), threading.Event(), list[list[float]]()
        self.gate.set()

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
        self.shades.append([row["shade"] for row in parameters])
        self.entered.set()
        assert self.gate.wait(20)
        return torch.zeros(len(seeds), 3, 8, 8, dtype=torch.uint8)


@dataclass
class Serving:
    """A server of one painter."""

    painter: Painter
    service: GenerationService
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
        self.painter.gate.clear()
        self.painter.entered.clear()
        call = self.ask(10**6, 1, **whose)
        await self.until(self.painter.entered.is_set)
        return call

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def serving(settings: str = "") -> AsyncIterator[Serving]:
    """Runs a server; `settings` are lines of a server file."""
    text = f"buckets: [1, 4, 16]\ngenerators: [{{name: stable_unclip, model: m}}]\n{settings}"
    file = validate(ServerFile, parse_document(text, "server.yaml"))
    admission = Admission(file.limits)
    statistics = Statistics("cpu", queued_bytes=lambda: admission.num_bytes, queued_of=lambda client: 0)
    service = GenerationService(file, "cpu", 1, admission, statistics)
    painter, device = Painter(), ThreadPoolExecutor(1)
    engine = VariantEngine(painter, file.buckets)
    batcher = Batcher(engine, device)
    counters = statistics.register(
        "painter",
        buckets=engine.buckets,
        queued=batcher.queued_by_priority,
        running=lambda: batcher.running,
        largest_bucket=lambda: batcher.largest_bucket,
    )
    hosted = Hosted(
        "painter",
        engine,
        batcher=batcher,
        embedder=Embedder(engine, device, 1000, counters.embedded),
        memory=MemoryCache(0),
        store=None,
        counters=counters,
        file=file,
        codec=service.codec,
    )
    service.hosted, service.state = {"painter": hosted}, "serving"
    largest = file.limits.max_variants_per_request
    guards = [TokenInterceptor(Tokens(file.tokens, largest), statistics)] if file.tokens else []
    server = grpc.aio.server(interceptors=guards)
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Serving(painter, service, hosted, pb_grpc.GenerationServiceStub(channel))
    finally:
        painter.gate.set()
        await service.close()
        await server.stop(0)
        device.shutdown()
