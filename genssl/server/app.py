"""Runs a generation server: bind, load, warm, serve, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from genssl.base.devices import pick_device, set_threads
from genssl.base.files import write_atomically
from genssl.config.base import ComponentConfig
from genssl.config.server import ServerFile, generator_id
from genssl.errors import GeneratorError, UserError
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.generators.open import open_generator
from genssl.registry import GENERATORS
from genssl.server.admission import Admission
from genssl.server.auth import TokenInterceptor, Tokens
from genssl.server.cache import MemoryCache, WriteThrough
from genssl.server.certificates import Refreshable, ServerCertificate, keep_rereading
from genssl.server.guard import GuardInterceptor
from genssl.server.hosted import Hosted
from genssl.server.metrics import MetricsServer
from genssl.server.service import GenerationService
from genssl.server.statistics import Statistics
from genssl.server.transport.release import remember_starters
from genssl.server.transport.transfer import TransferInterceptor
from genssl.variants.engine import VariantEngine
from genssl.variants.store.manifest import read_manifest
from genssl.variants.store.store import VariantStore
from genssl.wire.channel import SERVICE, server_options

log = logging.getLogger(__name__)

LAST_WORD_SECONDS = 0.5  # for watchers to read that the server is going


async def serve(file: ServerFile, *, address_file: Path | None = None, exit_with_stdin: bool = False) -> None:
    """Serves until SIGTERM or SIGINT; a second one stops at once.

    Args:
        file: what to host, where, and within which limits.
        address_file: gets the address once the port is bound, written atomically.
        exit_with_stdin: also stop when standard input closes, which it does when the parent process ends in any way.

    Raises:
        UserError: if the address is taken, a certificate, key or token cannot be used, or a generator cannot be loaded.
    """
    device = pick_device(file.device)
    threads = set_threads(file.threads) if device.type == "cpu" else 0
    for warning in file.warnings():
        log.warning(warning)
    for config in file.generators:
        # Imports hold the interpreter's lock for seconds; done later, they would leave health checks unanswered.
        GENERATORS.get(config.name)

    # --- who counts, and who is let in ---
    admission = Admission(file.limits)
    buckets = file.buckets[-1:] if file.batching == "deterministic" else file.buckets
    statistics = Statistics(str(device), buckets, queued_bytes=lambda: admission.num_bytes)
    guard = GuardInterceptor(statistics)
    interceptors: list[grpc.aio.ServerInterceptor] = [TransferInterceptor(file.limits, admission, statistics), guard]
    remember_starters(asyncio.get_running_loop())
    reread: list[Refreshable] = []
    if file.tokens:
        tokens = Tokens(file.tokens, file.limits.max_variants_per_request)
        interceptors.append(TokenInterceptor(tokens, statistics))
        reread.append(tokens)
    credentials = None
    if file.tls is not None:
        certificate = ServerCertificate(file.tls)
        statistics.watch_certificate(lambda: certificate.expires)
        credentials = certificate.credentials()
        reread.append(certificate)

    # --- the services ---
    service = GenerationService(file, str(device), threads, admission, statistics)
    health_service = health.aio.HealthServicer()
    server = grpc.aio.server(options=server_options(file.limits), interceptors=interceptors)
    pb_grpc.add_GenerationServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    stopped = _stop_event(exit_with_stdin)

    async def set_health(status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE):
            await health_service.set(name, status)

    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        if file.metrics is not None:
            metrics = MetricsServer(file.metrics, statistics.registry)
            stack.callback(metrics.close)
            log.info("metrics at http://%s/metrics", metrics.address)
        store = None
        if file.store is not None:
            kept = store = WriteThrough(VariantStore(file.store.path, max_bytes=file.store.max_bytes))
            stack.push_async_callback(store.close)
            statistics.watch_store(lambda: kept.state)
            reread.append(store)

        # --- bind and load ---
        device_thread = ThreadPoolExecutor(1, thread_name_prefix="genssl-device")
        stack.callback(device_thread.shutdown, wait=False, cancel_futures=True)
        stack.push_async_callback(service.close)
        stack.push_async_callback(server.stop, None)
        await set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = _bind(server, file.address, credentials)
        await server.start()
        if address_file is not None:
            try:
                write_atomically(address_file, lambda path: path.write_text(address + "\n"))
            except OSError as error:
                message = f"--address-file {address_file}: cannot be written ({error.strerror})"
                raise UserError(message) from None
        log.info("listening on %s, loading %s", address, ", ".join(config.name for config in file.generators))
        for watch in (statistics.watch_loop(), keep_rereading(reread)):
            stack.callback(loop.create_task(watch).cancel)
        loading = loop.create_task(_host_all(file, device, service, statistics, device_thread, store))
        await asyncio.wait([loading, loop.create_task(stopped.wait())], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()

        # --- serve and drain ---
        if not stopped.is_set():
            statistics.state = "serving"
            await set_health(health_pb2.HealthCheckResponse.SERVING)
            log.info("serving %s on %s", ", ".join(service.hosted), address)
            await stopped.wait()
        log.info("draining for at most %g s", file.drain_seconds)
        statistics.state = "draining"
        await set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        stopping = loop.create_task(server.stop(file.drain_seconds))
        await asyncio.wait([stopping, loop.create_task(guard.answered())], return_when=asyncio.FIRST_COMPLETED)
        await server.stop(LAST_WORD_SECONDS)  # health watches and other streams that only wait are no work
        await stopping
    log.info("stopped")


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    """Binds the address and returns it with the port that was taken."""
    try:
        if _is_answered(address):
            port = 0
        elif credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0 and address.startswith("unix:") and not Path(address.removeprefix("unix:")).parent.is_dir():
        raise UserError(f"address {address}: the folder of the socket does not exist; make it first")
    if port == 0:
        raise UserError(
            f"address {address}: cannot be bound{_why_not(address)}. Choose another, or port 0 for any free port"
        )
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).chmod(0o600)
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _why_not(address: str) -> str:
    """Returns what the system says to an address that gRPC cannot bind, which says nothing."""
    if address.startswith("unix:"):
        return "; another server is using it"
    host, _, port = address.rpartition(":")
    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(place)
    except OSError as error:
        return f" ({error.strerror or error})"
    return ""


def _is_answered(address: str) -> bool:
    """Says whether a server listens on a socket file: gRPC would take the file away from it without a word."""
    if not address.startswith("unix:"):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(address.removeprefix("unix:")) == 0


async def _host_all(
    file: ServerFile,
    device: torch.device,
    service: GenerationService,
    statistics: Statistics,
    device_thread: ThreadPoolExecutor,
    store: WriteThrough | None,
) -> None:
    """Loads and warms the generators one after the other, and hands all to the service once the last is ready.

    Raises:
        UserError: if one cannot be loaded.
    """
    loop = asyncio.get_running_loop()
    memory = MemoryCache(file.memory_cache_bytes)

    async def host(config: ComponentConfig) -> Hosted:
        # Fingerprints of the variants that there are already, here and at the clients.
        known = set(file.known_fingerprints)
        if file.store is not None:
            manifest = read_manifest(file.store.path)
            known |= {*manifest.generators, manifest.pinned or ""}
        name = generator_id(config)
        generator = await loop.run_in_executor(device_thread, open_generator, config, device, known)
        engine = VariantEngine(generator, file.buckets, deterministic=file.batching == "deterministic")
        counters = statistics.register(name)
        hosted = Hosted(
            name, engine, device_thread, memory=memory, store=store, counters=counters, file=file, codec=service.codec
        )
        try:
            for bucket, seconds in await loop.run_in_executor(device_thread, warm_up, engine):
                hosted.batcher.cost.observe(engine.complete({}).batch_key, bucket, seconds)
        except torch.OutOfMemoryError:
            raise GeneratorError(
                f"generator {name}: a batch of {engine.buckets[-1]} does not fit into the memory of "
                f"{device}; lower the largest of `buckets` (variants.buckets in a recipe)"
            ) from None
        spec = generator.spec
        if store is not None:
            await store.describe(spec)
        log.info(
            "loaded %s (%s), fingerprint %s, %d px", name, spec.model, spec.fingerprint.hex()[:12], spec.image_size
        )
        return hosted

    service.hosted = {generator_id(config): await host(config) for config in file.generators}


def warm_up(engine: VariantEngine) -> list[tuple[int, float]]:
    """Computes batches of every bucket, so that the first request does not pay for kernel selection.

    Returns:
        Each bucket with the seconds that its second batch took.
    """
    grey = engine.generator.preprocess(np.full((3, 8, 8), 128, dtype=np.uint8))
    settings = replace(engine.complete({}), variation=None)  # what varies would not let the rows share a batch
    costs = []
    for bucket in engine.buckets:
        if engine.kept is None:
            embeddings, _ = engine.embed([grey] * bucket)
        else:  # the conditioner may never be needed, and is not loaded for this
            embeddings = [torch.zeros(engine.kept.width)] * bucket
        rows = [engine.row(bytes(16), embedding, index, settings) for index, embedding in enumerate(embeddings)]
        engine.generate(rows)
        costs.append((bucket, engine.generate(rows)[1]))
    return costs


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
