"""Prometheus metrics of a server, on a port and in threads of their own."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from genssl import __version__
from genssl.config.address import is_local
from genssl.config.server import MetricsConfig
from genssl.errors import UserError
from genssl.server.statistics import STATES, STORE_STATES, Histogram, Statistics

log = logging.getLogger(__name__)

PATH = "/metrics"
PRIORITIES = ("interactive", "training", "bulk")
LOOP_SECONDS = 2.0  # a scrape that fails is an alarm; one that hangs is not
CLIENT_SECONDS = 10.0  # after which a scraper that sends nothing is dropped


class MetricsServer:
    """Serves `/metrics` until `close`; make it on the event loop that the statistics belong to.

    Args:
        config: where to listen.
        statistics: what to show.

    Raises:
        UserError: if the address is taken or is not one of this machine's.
    """

    def __init__(self, config: MetricsConfig, statistics: Statistics) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_OnLoop(statistics, asyncio.get_running_loop()))
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
        """Says nothing: a scraper that hangs up is no event in the server's life."""


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
    """Reads the statistics on their own event loop, where nothing changes them meanwhile."""

    def __init__(self, statistics: Statistics, loop: asyncio.AbstractEventLoop) -> None:
        self._statistics, self._loop = statistics, loop

    def collect(self) -> Iterable[Metric]:
        async def read() -> list[Metric]:
            return list(families(self._statistics))

        return asyncio.run_coroutine_threadsafe(read(), self._loop).result(LOOP_SECONDS)


def families(statistics: Statistics) -> Iterator[Metric]:
    """Yields every metric; labels are generators, priorities, origins, reasons, methods and codes, never clients."""
    yield _gauge("build_info", "What runs here.", {"version": __version__, "device": statistics.device}, 1)
    state = GaugeMetricFamily("genssl_state", "1 for the state that the server is in.", labels=["state"])
    for name in STATES:
        state.add_metric([name], float(name == statistics.state))
    yield state
    yield _gauge("draining", "1 while the server finishes its last requests.", {}, statistics.state == "draining")
    yield _gauge(
        "queued_bytes", "Bytes of requests and finished variants held now.", {}, statistics.queued_bytes(), unit="bytes"
    )
    yield _gauge("clients", "Clients seen in the last minutes.", {}, len(statistics.clients()))
    lag = HistogramMetricFamily(
        "genssl_event_loop_lag_seconds", "How late the event loop ran what was due.", unit="seconds"
    )
    _add(lag, [], statistics.loop_lag)
    yield lag
    yield _gauge(
        "event_loop_lag_recent_max_seconds",
        "Greatest lag of the event loop in the last ten seconds.",
        {},
        statistics.recent_loop_lag,
        unit="seconds",
    )
    if statistics.store_state is not None:
        stored = GaugeMetricFamily(
            "genssl_store_state", "1 for what becomes of variants that are to be stored.", labels=["state"]
        )
        for what in STORE_STATES:
            stored.add_metric([what], float(what == statistics.store_state()))
        yield stored
    if statistics.certificate_expires is not None:
        yield _gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "When the server's certificate expires, in seconds since 1970.",
            {},
            statistics.certificate_expires(),
            unit="seconds",
        )
    rejected = CounterMetricFamily("genssl_rejected", "Requests and items refused.", labels=["reason"])
    for reason, count in statistics.rejections.items():
        rejected.add_metric([reason], count)
    yield rejected
    requests = CounterMetricFamily("genssl_requests", "Finished calls.", labels=["method", "code"])
    for (method, code), count in statistics.requests.items():
        requests.add_metric([method, code], count)
    yield requests
    seconds = HistogramMetricFamily(
        "genssl_request_seconds", "From a call to its answer.", labels=["method"], unit="seconds"
    )
    for method, histogram in statistics.request_seconds.items():
        _add(seconds, [method], histogram)
    yield seconds
    yield from _generator_families(statistics)


def _generator_families(statistics: Statistics) -> Iterator[Metric]:
    by_generator = ["generator"]
    depth = GaugeMetricFamily("genssl_queue_depth", "Rows that wait now.", labels=["generator", "priority"])
    running = GaugeMetricFamily("genssl_running_variants", "Rows on the device now.", labels=by_generator)
    largest = GaugeMetricFamily("genssl_largest_bucket", "The largest batch size in use.", labels=by_generator)
    occupancy = GaugeMetricFamily(
        "genssl_batch_occupancy_ratio",
        "Wanted rows over computed rows in the last 100 batches; the rest was padding.",
        labels=by_generator,
    )
    variants = CounterMetricFamily("genssl_variants", "Variants delivered.", labels=["generator", "origin"])
    hits = CounterMetricFamily(
        "genssl_cache_hits", "Variants and embeddings that need not be computed.", labels=["generator", "cache"]
    )
    failed = CounterMetricFamily("genssl_variants_failed", "Rows on which the generator failed.", labels=by_generator)
    dropped = CounterMetricFamily(
        "genssl_variants_dropped", "Rows dropped: client gone, or deadline passed.", labels=by_generator
    )
    redrawn = CounterMetricFamily("genssl_variants_redrawn", "Draws that drift guards added.", labels=by_generator)
    embedded = CounterMetricFamily("genssl_sources_embedded", "Sources embedded.", labels=by_generator)
    embed = CounterMetricFamily(
        "genssl_embed_seconds", "Device time of embedding.", labels=by_generator, unit="seconds"
    )
    wait = HistogramMetricFamily(
        "genssl_queue_wait_seconds", "A row's wait for its batch.", labels=by_generator, unit="seconds"
    )
    size = HistogramMetricFamily("genssl_batch_size", "Wanted rows of a batch.", labels=by_generator)
    batches = CounterMetricFamily("genssl_batches", "Batches by size with padding.", labels=["generator", "bucket"])
    generate = HistogramMetricFamily(
        "genssl_generate_seconds", "Device time of a batch.", labels=by_generator, unit="seconds"
    )
    encode = HistogramMetricFamily(
        "genssl_encode_seconds", "Time in which a request's variants were encoded.", labels=by_generator, unit="seconds"
    )
    for name, counters in statistics.generators.items():
        for priority in PRIORITIES:
            depth.add_metric([name, priority], counters.queued().get(priority, 0))
        running.add_metric([name], counters.running())
        largest.add_metric([name], counters.largest_bucket())
        occupancy.add_metric([name], counters.occupancy)
        for origin, count in counters.variants.items():
            variants.add_metric([name, origin], count)
        hits.add_metric([name, "memory"], counters.variants["memory"])
        hits.add_metric([name, "store"], counters.variants["store"])
        hits.add_metric([name, "embedding"], counters.embeddings_reused)
        failed.add_metric([name], counters.failed)
        dropped.add_metric([name], counters.dropped)
        redrawn.add_metric([name], counters.redrawn())
        embedded.add_metric([name], counters.sources_embedded)
        embed.add_metric([name], counters.embed_seconds)
        for bucket, batch in sorted(counters.batches.items()):
            batches.add_metric([name, str(bucket)], batch.batches)
        _add(wait, [name], counters.queue_wait)
        _add(size, [name], counters.batch_size)
        _add(generate, [name], counters.generate)
        _add(encode, [name], counters.encode)
    yield from (depth, running, largest, occupancy, variants, hits, failed, dropped, redrawn, embedded, embed, wait)
    yield from (size, batches, generate, encode)


def _gauge(name: str, help: str, labels: dict[str, str], value: float, *, unit: str = "") -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(f"genssl_{name}", help, labels=list(labels), unit=unit)
    gauge.add_metric(list(labels.values()), float(value))
    return gauge


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    """Adds a histogram in Prometheus' way: each bucket counts everything up to its bound."""
    total, buckets = 0, []
    for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
    family.add_metric(labels, buckets, histogram.sum)
