"""Prometheus metrics of a server: the instruments, and the port where they are read, in threads of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    values,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from genssl.config.address import is_local
from genssl.config.server import MetricsConfig
from genssl.errors import UserError

log = logging.getLogger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a time series more for each, which nobody reads

# One process counts here. PROMETHEUS_MULTIPROC_DIR, inherited from a web server, would put the numbers into its files.
values.ValueClass = values.MutexValue

PATH = "/metrics"
# From a small network on a GPU to a diffusion model with a long queue, three bounds a decade.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LOOP_SECONDS = 2.0  # a scrape that fails is an alarm; one that hangs is not
CLIENT_SECONDS = 10.0  # after which a scraper that sends nothing is dropped


class Instruments:
    """The metrics that every server has; their labels are generators, reasons, methods and the like, never clients."""

    def __init__(self, registry: CollectorRegistry, buckets: Sequence[int]) -> None:
        counter = partial(Counter, namespace="genssl", registry=registry)
        gauge = self.gauge = partial(Gauge, namespace="genssl", registry=registry)
        histogram = partial(Histogram, namespace="genssl", registry=registry)
        generator = ["generator"]

        self.build_info = gauge("build_info", "What runs here.", ["version", "device"])
        self.state = gauge("state", "1 for the state that the server is in.", ["state"])
        self.draining = gauge("draining", "1 while the server finishes its last requests.")
        self.queued_bytes = gauge("queued_bytes", "Bytes of requests and finished variants held now.", unit="bytes")
        self.clients = gauge("clients", "Clients seen in the last minutes.")
        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop ran what was due.", unit="seconds", buckets=LAG_SECONDS
        )
        self.recent_loop_lag = gauge(
            "event_loop_lag_recent_max_seconds",
            "Greatest lag of the event loop in the last ten seconds.",
            unit="seconds",
        )
        self.rejected = counter("rejected", "Requests and items refused.", ["reason"])
        self.requests = counter("requests", "Finished calls.", ["method", "code"])
        self.request_seconds = histogram(
            "request_seconds", "From a call to its answer.", ["method"], unit="seconds", buckets=SECONDS
        )

        self.depth = gauge("queue_depth", "Rows that wait now.", ["generator", "priority"])
        self.running = gauge("running_variants", "Rows on the device now.", generator)
        self.largest_bucket = gauge("largest_bucket", "The largest batch size in use.", generator)
        self.occupancy = gauge(
            "batch_occupancy_ratio",
            "Wanted rows over computed rows in the last 100 batches; the rest was padding.",
            generator,
        )
        self.variants = counter("variants", "Variants delivered.", ["generator", "origin"])
        self.hits = counter("cache_hits", "Variants and embeddings that need not be computed.", ["generator", "cache"])
        self.failed = counter("variants_failed", "Rows on which the generator failed.", generator)
        self.dropped = counter("variants_dropped", "Rows dropped: client gone, or deadline passed.", generator)
        self.redrawn = counter("variants_redrawn", "Draws that drift guards added.", generator)
        self.embedded = counter("sources_embedded", "Sources embedded.", generator)
        self.embed = counter("embed_seconds", "Device time of embedding.", generator, unit="seconds")
        self.wait = histogram(
            "queue_wait_seconds", "A row's wait for its batch.", generator, unit="seconds", buckets=SECONDS
        )
        self.size = histogram("batch_size", "Wanted rows of a batch.", generator, buckets=buckets)
        self.batches = counter("batches", "Batches by size with padding.", ["generator", "bucket"])
        self.generate = histogram(
            "generate_seconds", "Device time of a batch.", generator, unit="seconds", buckets=SECONDS
        )
        self.encode = histogram(
            "encode_seconds",
            "Time in which a request's variants were encoded.",
            generator,
            unit="seconds",
            buckets=SECONDS,
        )


def show_state(gauge: Gauge, states: Sequence[str], now: Callable[[], str]) -> None:
    """Makes a gauge 1 for the state that holds now, and 0 for the others."""
    for state in states:
        gauge.labels(state).set_function(partial(_is_so, state, now))


def _is_so(state: str, now: Callable[[], str]) -> bool:
    return state == now()


class MetricsServer:
    """Serves `/metrics` until `close`; make it on the event loop that the metrics belong to.

    Raises:
        UserError: if the address is taken or is not one of this machine's.
    """

    def __init__(self, config: MetricsConfig, metrics: CollectorRegistry) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_OnLoop(metrics, asyncio.get_running_loop()))
        ProcessCollector(registry=registry)
        host, _, port = config.address.rpartition(":")
        try:
            self._server = _HTTPServer(host.strip("[]"), int(port), registry)
        except OSError as error:
            raise UserError(
                f"metrics.address: {config.address}: cannot be bound ({error.strerror or error}); "
                "choose another, or port 0 for any free port"
            ) from None
        self.address = f"{host}:{self._server.socket.getsockname()[1]}"
        if not is_local(config.address):
            log.warning("metrics.address %s: anyone who reaches it can read the metrics", self.address)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="genssl-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops answering and frees the port; returns within a fraction of a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _HTTPServer(ThreadingTCPServer):
    """Not http.server's: that one looks its own name up in DNS before it listens."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.address_family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: that a scraper hangs up does not concern the server."""


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS
    server: _HTTPServer

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self._answer(404, "text/plain; charset=utf-8", f"only {PATH} is served here\n".encode())
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        try:
            body = encode(self.server.registry)
        except TimeoutError:
            self._answer(503, "text/plain; charset=utf-8", b"the server's event loop is blocked\n")
            return
        self._answer(200, content_type, body)

    do_HEAD = do_GET

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        """Returns the Server header, which by default would name the Python version."""
        return "genssl"

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing; scrapes come every few seconds."""


class _OnLoop(Collector):
    """Collects the metrics on their own event loop, where nothing changes them meanwhile."""

    def __init__(self, registry: CollectorRegistry, loop: asyncio.AbstractEventLoop) -> None:
        self._registry, self._loop = registry, loop

    def collect(self) -> Iterable[Metric]:
        async def read() -> list[Metric]:
            return list(self._registry.collect())

        return asyncio.run_coroutine_threadsafe(read(), self._loop).result(LOOP_SECONDS)
