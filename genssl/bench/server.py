"""Measures a generation server: throughput, latency, and how both compare with generating in process.

Server and in-process generation take turns within one run, on equal threads and batch sizes, so that a machine that
slows down slows both. Every variant asked for is new: its index is drawn at the start, so that no cache has it.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from genssl.base.devices import pick_device
from genssl.client.aio import AsyncVariantClient
from genssl.client.channel import ClientTLS
from genssl.data.base import raw_image
from genssl.errors import UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.parameters import Parameters
from genssl.registry import GENERATORS
from genssl.variants.engine import VariantEngine
from genssl.variants.source import VariantRequest

SOURCES = 256
TRIAL_SECONDS = 0.5
MOST_IN_FLIGHT = 1024  # the load decides, not the client's window


@dataclass(frozen=True)
class Load:
    """What the server is put under.

    Attributes:
        rate: variants a second in all, sent at fixed times whatever the server does (open loop); None: closed
            loop.
    """

    clients: int = 1  # connections of their own
    rows: int = 64  # variants a request
    in_flight: int = 2  # requests that each client keeps under way (closed loop)
    rate: float | None = None
    seconds: float = 10.0  # of server time, over all rounds
    rounds: int = 5  # turns that server and in-process generation take


@dataclass
class Round:
    """One turn: variants that came, its length, and the latency of each request in seconds."""

    variants: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Variants a second."""
        return self.variants / self.seconds if self.seconds else 0.0


class ServerBench:
    """Asks one server, through connected clients, for variants of a generator that nobody has asked for yet."""

    def __init__(self, clients: Sequence[AsyncVariantClient], info: pb.GeneratorInfo, load: Load) -> None:
        self._clients, self._info, self._load = clients, info, load
        shape = (SOURCES, 3, info.image_size, info.image_size)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self._sources = [raw_image(image) for image in images]
        self._next = secrets.randbits(62)
        self.refusals = 0

    async def _ask(self, client: AsyncVariantClient, result: Round, due: float) -> None:
        numbers = range(self._next, self._next + self._load.rows)
        self._next += self._load.rows
        requests = [
            VariantRequest(row=number % SOURCES, source_id=self._sources[number % SOURCES].source_id, index=number)
            for number in numbers
        ]
        answer = await client.generate(self._info, requests, self._sources.__getitem__, {})
        result.latencies.append(time.perf_counter() - due)
        result.variants += len(answer.images)
        self.refusals += answer.refusals

    async def warm(self) -> None:
        """Makes every source known to the server."""
        for _ in range(-(-SOURCES // self._load.rows)):
            await self._ask(self._clients[0], Round(), time.perf_counter())

    async def closed(self, seconds: float) -> Round:
        """Keeps `in_flight` requests a client under way for so long."""
        result, started = Round(), time.perf_counter()

        async def keep_asking(client: AsyncVariantClient) -> None:
            while time.perf_counter() - started < seconds:
                await self._ask(client, result, time.perf_counter())

        await asyncio.gather(*(keep_asking(client) for client in self._clients for _ in range(self._load.in_flight)))
        result.seconds = time.perf_counter() - started
        return result

    async def open(self, seconds: float, rate: float) -> Round:
        """Sends requests at fixed times; latency counts from when each was due, late sending included."""
        result, started = Round(), time.perf_counter()
        pause = self._load.rows / rate
        tasks = []
        for number in range(max(1, round(seconds / pause))):
            due = started + number * pause
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            client = self._clients[number % len(self._clients)]
            tasks.append(asyncio.create_task(self._ask(client, result, due)))
        await asyncio.gather(*tasks)
        result.seconds = time.perf_counter() - started
        return result


class InProcess:
    """The server's generator, loaded here, at the batch size at which it is fastest.

    Raises:
        UserError: if the same generator cannot be loaded here; the message says why.
    """

    def __init__(self, info: pb.GeneratorInfo, server: pb.GetServerInfoResponse) -> None:
        device = pick_device("auto" if server.device.startswith("cuda") else "cpu")
        if not server.device.startswith(device.type):
            raise UserError(f"the server computes on {server.device}, which is not here")
        if device.type == "cpu":
            torch.set_num_threads(max(1, server.threads))
        generator = GENERATORS.get(info.name)(_config(info), device)
        if generator.spec.fingerprint != info.fingerprint:
            raise UserError(f"the {info.name} that {info.model} names here is another than the server's")
        engines = [VariantEngine(generator, [bucket]) for bucket in server.buckets]
        image = np.random.default_rng(0).integers(0, 256, (3, info.image_size, info.image_size), dtype=np.uint8)
        (self._embedding,), _ = engines[0].embed([generator.preprocess(image)])
        known = generator.spec.defaults  # what varies on the server is in none of the generator's own settings
        self._parameters: Parameters = {
            name: value for name, value in info.default_parameters.items() if name not in known
        }
        self._next = secrets.randbits(62)
        self._engine = max(engines, key=lambda engine: self._run(engine, TRIAL_SECONDS).rate)
        self.bucket = self._engine.buckets[-1]

    def run(self, seconds: float) -> Round:
        """Generates for so long."""
        return self._run(self._engine, seconds)

    def _run(self, engine: VariantEngine, seconds: float) -> Round:
        result, started, settings = Round(), time.perf_counter(), engine.complete(self._parameters)
        while result.seconds < seconds:
            numbers = range(self._next, self._next + engine.buckets[-1])
            self._next += len(numbers)
            rows = [engine.row(bytes(16), self._embedding, number, settings) for number in numbers]
            for positions in engine.batches(rows):
                engine.generate([rows[position] for position in positions])
            result.variants += len(numbers)
            result.seconds = time.perf_counter() - started
        return result


def _config(info: pb.GeneratorInfo) -> Any:
    """Returns the config of the server's generator: its model, settings and default parameters."""
    model = GENERATORS.config(info.name)
    given: dict[str, Any] = {"name": info.name, "model": info.model}
    for name, value in {**info.settings, **info.default_parameters}.items():
        if name in model.model_fields:
            given[name] = None if value == "None" else value
    try:
        return model.model_validate(given)
    except ValueError as error:
        raise UserError(f"the server's settings are not a config of {info.name} here: {error}") from None


async def bench(
    target: str,
    load: Load,
    *,
    generator: str | None = None,
    in_process: bool = True,
    token: str | None = None,
    tls: ClientTLS | None = None,
) -> dict[str, Any]:
    """Runs the benchmark of a server's generator (None: its only one) and returns what the JSON file holds."""
    clients = [
        AsyncVariantClient(target, client_id=f"bench-{number}", token=token, tls=tls, max_in_flight=MOST_IN_FLIGHT)
        for number in range(load.clients)
    ]
    try:
        for client in clients:
            await client.connect()
        info = await clients[0].find_generator(generator)
        run = ServerBench(clients, info, load)
        server = clients[0].servers[target]
        local, why_not = None, "not asked for"
        if in_process:
            try:
                local = InProcess(info, server)
            except UserError as error:
                why_not = str(error)
        await run.warm()
        before = (await clients[0].statistics())[target]
        served: list[Round] = []
        here: list[Round] = []
        for number in range(load.rounds):
            seconds = load.seconds / load.rounds
            for turn in ("server", "here") if number % 2 == 0 else ("here", "server"):
                if turn == "server":
                    served.append(await (run.closed(seconds) if load.rate is None else run.open(seconds, load.rate)))
                elif local is not None:
                    here.append(await asyncio.to_thread(local.run, seconds))
        after = (await clients[0].statistics())[target]
    finally:
        for client in clients:
            await client.close()
    return {
        **_load_report(target, load, info, server, served),
        "refusals": run.refusals,
        **_batch_report(info, before, after),
        **_ratio_report(local, why_not, served, here),
    }


def _load_report(
    target: str, load: Load, info: pb.GeneratorInfo, server: pb.GetServerInfoResponse, served: Sequence[Round]
) -> dict[str, Any]:
    """Returns what was asked of the server, and how fast it answered."""
    latencies = sorted(latency for turn in served for latency in turn.latencies)
    return {
        "target": target,
        "generator": {"id": info.generator_id, "name": info.name, "model": info.model},
        "server": {
            "version": server.version,
            "device": server.device,
            "threads": server.threads,
            "buckets": list(server.buckets),
        },
        "load": {
            "loop": "closed" if load.rate is None else "open",
            "clients": load.clients,
            "rows_per_request": load.rows,
            "in_flight_per_client": load.in_flight if load.rate is None else None,
            "variants_per_second_asked": load.rate,
            "seconds": load.seconds,
            "rounds": load.rounds,
        },
        "requests": len(latencies),
        "variants": sum(turn.variants for turn in served),
        "variants_per_second": round(sum(turn.variants for turn in served) / sum(turn.seconds for turn in served), 1),
        "latency_seconds": {
            "p50": round(_quantile(latencies, 0.5), 5),
            "p99": round(_quantile(latencies, 0.99), 5),
            "max": round(latencies[-1], 5),
        },
    }


def _batch_report(
    info: pb.GeneratorInfo, before: pb.GetStatisticsResponse, after: pb.GetStatisticsResponse
) -> dict[str, float]:
    """Returns how full the generator's batches were between two readings."""
    batches = rows = computed = 0
    for reading, sign in ((after, 1), (before, -1)):
        (one,) = [counters for counters in reading.generators if counters.generator_id == info.generator_id]
        batches += sign * sum(batch.batches for batch in one.batches)
        rows += sign * sum(batch.rows for batch in one.batches)
        computed += sign * sum(batch.batches * batch.bucket for batch in one.batches)
    return {
        "batches": batches,
        "mean_batch_size": round(rows / max(1, batches), 2),
        "occupancy": round(rows / max(1, computed), 4),
    }


def _ratio_report(
    local: InProcess | None, why_not: str, served: Sequence[Round], here: Sequence[Round]
) -> dict[str, Any]:
    """Returns how the server compares with generating in this process, or why that is not known."""
    if local is None:
        return {"in_process": None, "ratio_to_in_process": None, "why_no_ratio": why_not}
    pairs = [(turn.rate, own.rate) for turn, own in zip(served, here, strict=True)]
    return {
        "in_process": {
            "batch_size": local.bucket,
            "variants_per_second": round(statistics.median(own for _, own in pairs), 1),
        },
        # The median of the rounds' ratios: a neighbour's burst of work spoils one round, not the result.
        "ratio_to_in_process": round(statistics.median(rate / own for rate, own in pairs), 4),
        "rounds": [{"server": round(rate, 1), "in_process": round(own, 1)} for rate, own in pairs],
    }


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Returns the value below which a fraction q of ascending values lies (nearest rank)."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
