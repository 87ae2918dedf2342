"""What the batcher itself costs: `pytest tests/benchmarks/test_batcher.py --benchmark-only`.

The aim is less than 20 microseconds a row, hand-over between batches included; the generator here does nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from genssl.generators.base import Alive, GeneratorSpec
from genssl.generators.parameters import Parameters
from genssl.server.batching.batcher import Batcher
from genssl.server.batching.jobs import Caller, MadeImage
from genssl.server.batching.schedule import Submitter
from genssl.variants.engine import Row, VariantEngine

ROWS, CLIENTS = 256, 64


class Blank:
    """A generator of black images."""

    spec = GeneratorSpec("blank", "none", bytes(16), 4, 8, "none", {}, {})

    def preprocess(self, image):
        return image

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 4)

    def check(self, parameters: Parameters) -> None:
        pass

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        return ()

    def generate(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        return torch.zeros(len(seeds), 3, 8, 8, dtype=torch.uint8)


def test_rows(benchmark):
    engine = VariantEngine(Blank(), [1, 4, 16, 64])
    embedding, settings = torch.zeros(4), engine.complete({})
    requests = [
        [Row((client * ROWS + row).to_bytes(16), embedding, row, settings) for row in range(ROWS)]
        for client in range(CLIENTS)
    ]

    async def serve() -> int:
        with ThreadPoolExecutor(1) as device:
            batcher = Batcher(engine, device)
            answers = await asyncio.gather(
                *(batcher.submit(rows, Caller(Submitter(str(client)))) for client, rows in enumerate(requests))
            )
        return sum(isinstance(item, MadeImage) for answer in answers for item in answer)

    assert benchmark.pedantic(lambda: asyncio.run(serve()), rounds=5, warmup_rounds=1) == ROWS * CLIENTS
    benchmark.extra_info["microseconds_per_row"] = 1e6 * benchmark.stats["min"] / (ROWS * CLIENTS)
    assert benchmark.extra_info["microseconds_per_row"] < 20
