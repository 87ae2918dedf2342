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
from genssl.data.base import StoredImage, raw_image
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
        clients: connections of their own.
        rows: variants a request.
        in_flight: requests that each client keeps under way (closed loop).
        rate: variants a second in all, sent at fixed times whatever the server does (open loop); None: closed loop.
        seconds: of server time, over all rounds.
        rounds: turns that server and in-process generation take.
    """

    clients: int = 1
    rows: int = 64
    in_flight: int = 2
    rate: float | None = None
    seconds: float = 10.0
    rounds: int = 5


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


class Bench:
    """A run of the benchmark against one server.

    Args:
        clients: connected.
        info: the generator to ask for.
        load: what to put it under.
    """

    def __init__(self, clients: Sequence[AsyncVariantClient], info: pb.GeneratorInfo, load: Load) -> None:
        self._clients, self._info, self._load = clients, info, load
        images = np.random.default_rng(0).integers(
            0, 256, (SOURCES, 3, info.image_size, info.image_size), dtype=np.uint8
        )
        self._sources = [raw_image(image) for image in images]
        self._ids = [source.source_id for source in self._sources]
        self._next = secrets.randbits(62)
        self.refusals = 0

    def _requests(self) -> list[VariantRequest]:
        """Returns the next variants that nobody has asked for yet."""
        first = self._next
        self._next += self._load.rows
        return [
            VariantRequest(row=number % SOURCES, source_id=self._ids[number % SOURCES], index=number)
            for number in range(first, self._next)
        ]

    def _source(self, row: int) -> StoredImage:
        return self._sources[row]

    async def _ask(self, client: AsyncVariantClient, result: Round, due: float) -> None:
        answer = await client.generate(self._info, self._requests(), self._source, {})
        now = time.perf_counter()
        result.latencies.append(now - due)
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
    """The server's generator, loaded here.

    Args:
        info: what the server says of it.
        server: its batch sizes and threads.

    Raises:
        UserError: if the same generator cannot be loaded here; the message says why.
    """

    def __init__(self, info: pb.GeneratorInfo, server: pb.GetServerInfoResponse) -> None:
        device = pick_device("auto" if server.device.startswith("cuda") else "cpu")
        if not server.device.startswith(device.type):
            raise UserError(f"the server computes on {server.device}, which is not here")
        if device.type == "cpu":
            torch.set_num_threads(max(1, server.threads))
        factory = GENERATORS.get(info.name)
        config = _config(info)
        generator = factory(config, device)
        if generator.spec.fingerprint != info.fingerprint:
            raise UserError(f"the {info.name} that {info.model} names here is another than the server's")
        self._engines = [VariantEngine(generator, [bucket]) for bucket in server.buckets]
        image = np.random.default_rng(0).integers(0, 256, (3, info.image_size, info.image_size), dtype=np.uint8)
        (self._embedding,), _ = self._engines[0].embed([generator.preprocess(image)])
        known = generator.spec.defaults  # what varies on the server is in none of the generator's own settings
        self._parameters: Parameters = {
            name: value for name, value in info.default_parameters.items() if name not in known
        }
        self._next = secrets.randbits(62)
        self._engine = max(self._engines, key=lambda engine: self._run(engine, TRIAL_SECONDS).rate)

    @property
    def bucket(self) -> int:
        """The batch size at which it is fastest."""
        return self._engine.buckets[-1]

    def run(self, seconds: float) -> Round:
        """Generates for so long at the best batch size."""
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
        raise UserError(f"the server's settings are no config of {info.name} here: {error}") from None


async def bench(
    target: str,
    load: Load,
    *,
    generator: str | None = None,
    in_process: bool = True,
    token: str | None = None,
    tls: ClientTLS | None = None,
) -> dict[str, Any]:
    """Runs the benchmark and returns what the JSON file holds.

    Args:
        target: address of the server.
        load: what to put it under.
        generator: its id; None: the only one.
        in_process: whether to compare with generating here.
        token, tls: as for AsyncVariantClient.
    """
    clients = [
        AsyncVariantClient(target, client_id=f"bench-{number}", token=token, tls=tls, max_in_flight=MOST_IN_FLIGHT)
        for number in range(load.clients)
    ]
    try:
        for client in clients:
            await client.connect()
        info = await clients[0].find_generator(generator)
        run = Bench(clients, info, load)
        server = clients[0].servers[target]
        local, why_not = None, ""
        if in_process:
            try:
                local = InProcess(info, server)
            except UserError as error:
                why_not = str(error)
        await run.warm()
        before = (await clients[0].statistics())[target]
        rounds: list[tuple[Round, Round | None]] = []
        for number in range(load.rounds):
            seconds = load.seconds / load.rounds
            turns: dict[str, Round] = {}
            order = ["server", "in_process"] if number % 2 == 0 else ["in_process", "server"]
            for who in order:
                if who == "server":
                    served = run.closed(seconds) if load.rate is None else run.open(seconds, load.rate)
                    turns[who] = await served
                elif local is not None:
                    turns[who] = await asyncio.to_thread(local.run, seconds)
            rounds.append((turns["server"], turns.get("in_process")))
        after = (await clients[0].statistics())[target]
    finally:
        for client in clients:
            await client.close()
    return _report(target, load, info, server, rounds, _difference(info, before, after), run.refusals, local, why_not)


def _difference(
    info: pb.GeneratorInfo, before: pb.GetStatisticsResponse, after: pb.GetStatisticsResponse
) -> dict[str, float]:
    """Returns batches, rows and computed rows of the generator between two readings."""

    def of(reading: pb.GetStatisticsResponse) -> tuple[int, int, int]:
        (one,) = [counters for counters in reading.generators if counters.generator_id == info.generator_id]
        return (
            sum(batch.batches for batch in one.batches),
            sum(batch.rows for batch in one.batches),
            sum(batch.batches * batch.bucket for batch in one.batches),
        )

    batches, rows, computed = (later - earlier for earlier, later in zip(of(before), of(after), strict=True))
    return {
        "batches": batches,
        "mean_batch_size": round(rows / max(1, batches), 2),
        "occupancy": round(rows / max(1, computed), 4),
    }


def _report(
    target: str,
    load: Load,
    info: pb.GeneratorInfo,
    server: pb.GetServerInfoResponse,
    rounds: list[tuple[Round, Round | None]],
    batches: dict[str, float],
    refusals: int,
    local: InProcess | None,
    why_not: str,
) -> dict[str, Any]:
    latencies = sorted(latency for served, _ in rounds for latency in served.latencies)
    report: dict[str, Any] = {
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
        "variants": sum(served.variants for served, _ in rounds),
        "variants_per_second": round(sum(r.variants for r, _ in rounds) / sum(r.seconds for r, _ in rounds), 1),
        "latency_seconds": {
            "p50": round(_quantile(latencies, 0.5), 5),
            "p99": round(_quantile(latencies, 0.99), 5),
            "max": round(latencies[-1], 5),
        },
        "refusals": refusals,
        **batches,
        "in_process": None,
        "ratio_to_in_process": None,
    }
    if local is None:
        report["why_no_ratio"] = why_not or "not asked for"
        return report
    pairs = [(served.rate, here.rate) for served, here in rounds if here is not None]
    report["in_process"] = {
        "batch_size": local.bucket,
        "variants_per_second": round(statistics.median(here for _, here in pairs), 1),
    }
    # The median of the rounds' ratios: a neighbour's burst of work spoils one round, not the result.
    report["ratio_to_in_process"] = round(statistics.median(served / here for served, here in pairs), 4)
    report["rounds"] = [{"server": round(served, 1), "in_process": round(here, 1)} for served, here in pairs]
    return report


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Returns the value below which a fraction q of ascending values lies (nearest rank)."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
