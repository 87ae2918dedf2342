"""Runs a generation server: bind, load, warm, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from genssl.config.server import ServerFile, generator_id
from genssl.errors import GeneratorError, UserError
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.registry import GENERATORS
from genssl.runtime import pick_device, set_threads
from genssl.serving.channel import SERVICE, server_options
from genssl.serving.service import GenerationService, Hosted
from genssl.variants.engine import VariantEngine

log = logging.getLogger(__name__)


async def serve(file: ServerFile, *, address_file: Path | None = None, exit_with_stdin: bool = False) -> None:
    """Serves until SIGTERM or SIGINT; a second one stops at once.

    Args:
        file: what to host, where, and within which limits.
        address_file: gets the address once the port is bound, written atomically.
        exit_with_stdin: also stop when standard input closes, which it does when the parent process ends in any way.

    Raises:
        UserError: if the address is taken, or a generator cannot be loaded.
    """
    device = pick_device(file.device)
    if device.type == "cpu":
        set_threads(file.threads)
    for config in file.generators:
        # Imports hold the interpreter's lock for seconds; done later, they would leave health checks unanswered.
        GENERATORS.get(config.name)
    device_thread = ThreadPoolExecutor(1, thread_name_prefix="genssl-device")
    service = GenerationService(file.limits, device_thread, str(device))
    health_service = health.aio.HealthServicer()
    server = grpc.aio.server(options=server_options(file.limits.max_message_bytes))
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    stopped = _stop_event(exit_with_stdin)
    address = _bind(server, file.address)

    async def set_health(status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE):
            await health_service.set(name, status)

    await set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    await server.start()
    if address_file is not None:
        partial = address_file.with_name(address_file.name + ".part")
        partial.write_text(address + "\n")
        os.replace(partial, address_file)
    log.info("listening on %s, loading %s", address, ", ".join(config.name for config in file.generators))

    loop = asyncio.get_running_loop()
    loading = loop.create_task(_load(file, service, device_thread))
    await asyncio.wait([loading, loop.create_task(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
    try:
        if loading.done():
            loading.result()
        if not stopped.is_set():
            await set_health(health_pb2.HealthCheckResponse.SERVING)
            log.info("serving %s on %s", ", ".join(service.hosted), address)
            await stopped.wait()
        log.info("draining for at most %g s", file.drain_seconds)
        await set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.stop(file.drain_seconds)
    finally:
        await server.stop(None)
        await service.close()
        device_thread.shutdown(wait=False, cancel_futures=True)
        if address.startswith("unix:"):
            Path(address.removeprefix("unix:")).unlink(missing_ok=True)
    log.info("stopped")


def _bind(server: grpc.aio.Server, address: str) -> str:
    """Binds the address and returns it with the port that was taken."""
    try:
        port = 0 if _is_answered(address) else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise UserError(
            f"address {address}: cannot be bound; another server may be using it. "
            "Choose another, or port 0 for any free port"
        )
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).chmod(0o600)
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _is_answered(address: str) -> bool:
    """Says whether a server listens on a socket file: gRPC would take the file away from it without a word."""
    if not address.startswith("unix:"):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(address.removeprefix("unix:")) == 0


async def _load(file: ServerFile, service: GenerationService, device_thread: ThreadPoolExecutor) -> None:
    loop = asyncio.get_running_loop()
    device = pick_device(file.device)
    loaded: dict[str, Hosted] = {}
    for config in file.generators:
        generator = await loop.run_in_executor(device_thread, GENERATORS.get(config.name), config, device)
        engine = VariantEngine(generator, file.buckets, deterministic=file.batching == "deterministic")
        try:
            await loop.run_in_executor(device_thread, warm_up, engine)
        except torch.OutOfMemoryError:
            raise GeneratorError(
                f"generator {generator_id(config)}: a batch of {file.buckets[-1]} does not fit into the memory of "
                f"{device}; lower the largest of `buckets` (variants.buckets in a recipe)"
            ) from None
        loaded[generator_id(config)] = Hosted(generator_id(config), engine, device_thread, file.embedding_cache)
        spec = generator.spec
        log.info(
            "loaded %s (%s), fingerprint %s, %d px",
            generator_id(config),
            spec.model,
            spec.fingerprint.hex()[:12],
            spec.image_size,
        )
    service.hosted, service.loading = loaded, False


def warm_up(engine: VariantEngine) -> None:
    """Computes one batch of every bucket, so that the first request does not pay for kernel selection."""
    grey = engine.generator.preprocess(np.full((3, 8, 8), 128, dtype=np.uint8))
    settings = engine.complete({})
    for bucket in engine.buckets:
        embeddings, _ = engine.embed([grey] * bucket)
        engine.generate(
            [engine.row(bytes(16), embedding, index, settings) for index, embedding in enumerate(embeddings)]
        )


def _stop_event(exit_with_stdin: bool) -> asyncio.Event:
    """Returns an event that is set by SIGTERM, SIGINT and, if asked, the end of standard input."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def stop() -> None:
        if stopped.is_set():
            log.warning("stopping at once")
            os._exit(1)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if exit_with_stdin:

        def stdin_closed() -> None:
            if not os.read(sys.stdin.fileno(), 4096):
                loop.remove_reader(sys.stdin.fileno())
                stopped.set()

        try:
            loop.add_reader(sys.stdin.fileno(), stdin_closed)
        except (OSError, ValueError, AttributeError):
            raise UserError("--exit-with-stdin needs a pipe as standard input") from None
    return stopped
