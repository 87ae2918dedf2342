"""What a server counts: Prometheus instruments, from which /metrics and the answer to GetStatistics are both filled.

All of it belongs to the server's one event loop; whoever wants to read from another thread asks the loop (see
`metrics.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

from prometheus_client import CollectorRegistry

from genssl import __version__
from genssl.generation.v1 import generation_pb2 as pb
from genssl.server.batching.jobs import BatchReport
from genssl.server.batching.schedule import Priority
from genssl.server.metrics import Instruments, show_state
from genssl.variants.store.writers import StoreState

Origin = Literal["generated", "store", "memory", "shared"]
State = Literal["loading", "serving", "draining"]
Reason = Literal[
    "queue_full",
    "client_queue_full",
    "deadline",
    "cancelled",
    "too_large",
    "rate",
    "auth",
    "invalid",
    "bad_image",
    "not_ready",
]
ORIGINS: tuple[Origin, ...] = get_args(Origin)
REASONS: tuple[Reason, ...] = get_args(Reason)
STATES: tuple[State, ...] = get_args(State)
STORE_STATES: tuple[StoreState, ...] = get_args(StoreState)
CACHES = ("memory", "store", "embedding")

MOST_CLIENTS = 256
CLIENT_SECONDS = 600.0
CLIENT_ID_CHARACTERS = 128  # a client names itself; its name must not cost memory without bound
LAG_PERIOD, LAG_WINDOW = 0.1, 10.0
RECENT_BATCHES = 100


class Queue(Protocol):
    """A generator's queue, of which the metrics show what is so now."""

    def queued_by_priority(self) -> Mapping[str, int]:
        """Returns the rows that wait, by priority in lower case."""
        ...

    @property
    def running(self) -> int:
        """Rows on the device."""
        ...

    @property
    def largest_bucket(self) -> int:
        """The largest batch size in use."""
        ...


@dataclass
class BatchCounts:
    """Batches of one size: how many, the rows in them that were wanted, and their device seconds."""

    batches: int = 0
    rows: int = 0
    seconds: float = 0.0


class GeneratorCounters:
    """The counters of one generator; `Statistics.register` makes them."""

    def __init__(self, generator_id: str, instruments: Instruments) -> None:
        self.generator_id, self._instruments = generator_id, instruments
        self._variants = {origin: instruments.variants.labels(generator_id, origin) for origin in ORIGINS}
        self._hits = {cache: instruments.hits.labels(generator_id, cache) for cache in CACHES}
        self.failed = instruments.failed.labels(generator_id)
        self.dropped = instruments.dropped.labels(generator_id)
        self.redrawn = instruments.redrawn.labels(generator_id)
        self.encode = instruments.encode.labels(generator_id)
        self._embedded = instruments.embedded.labels(generator_id)
        self._embed = instruments.embed.labels(generator_id)
        self._wait, self._size = instruments.wait.labels(generator_id), instruments.size.labels(generator_id)
        self._generate = instruments.generate.labels(generator_id)
        self._batches: dict[int, BatchCounts] = {}
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT_BATCHES)
        self._queue: Queue | None = None
        instruments.occupancy.labels(generator_id).set_function(lambda: self.occupancy)

    def watch(self, queue: Queue) -> None:
        """Shows from now on what waits and runs in the generator's queue."""
        self._queue, instruments = queue, self._instruments

        def waiting(priority: str) -> float:
            return queue.queued_by_priority().get(priority, 0)

        for name in (priority.name.lower() for priority in Priority):
            instruments.depth.labels(self.generator_id, name).set_function(partial(waiting, name))
        instruments.running.labels(self.generator_id).set_function(lambda: queue.running)
        instruments.largest_bucket.labels(self.generator_id).set_function(lambda: queue.largest_bucket)

    def delivered(self, origin: Origin, variants: int = 1) -> None:
        """Counts variants that a client got."""
        self._variants[origin].inc(variants)
        if origin in self._hits:
            self._hits[origin].inc(variants)

    def batch_done(self, report: BatchReport) -> None:
        """Counts a batch."""
        counts = self._batches.setdefault(report.bucket, BatchCounts())
        counts.batches += 1
        counts.rows += report.rows
        counts.seconds += report.seconds
        self._instruments.batches.labels(self.generator_id, str(report.bucket)).inc()
        self._size.observe(report.rows)
        self._generate.observe(report.seconds)
        for wait in report.queue_waits:
            self._wait.observe(wait)
        self._recent.append((report.rows, report.bucket))

    def sources_embedded(self, sources: int, seconds: float) -> None:
        """Counts sources that were embedded in this many seconds of device time."""
        self._embedded.inc(sources)
        self._embed.inc(seconds)

    def embedding_reused(self) -> None:
        """Counts an embedding that was there already, or was about to be for another call."""
        self._hits["embedding"].inc()

    @property
    def occupancy(self) -> float:
        """Wanted rows over computed rows, padding included, in the last 100 batches; 0 before the first."""
        return sum(rows for rows, _ in self._recent) / max(1, sum(bucket for _, bucket in self._recent))

    def to_proto(self, value: Callable[..., float]) -> pb.GeneratorStatistics:
        """Returns what GetStatistics says of this generator; `value` reads a sample by name and labels."""
        own = partial(value, generator=self.generator_id)
        made = {origin: int(own("variants_total", origin=origin)) for origin in ORIGINS}
        return pb.GeneratorStatistics(
            generator_id=self.generator_id,
            queued=self._queue.queued_by_priority() if self._queue is not None else {},
            running=int(own("running_variants")),
            variants_generated=made["generated"],
            variants_from_store=made["store"],
            variants_from_memory=made["memory"],
            variants_shared=made["shared"],
            variants_failed=int(own("variants_failed_total")),
            variants_dropped=int(own("variants_dropped_total")),
            sources_embedded=int(own("sources_embedded_total")),
            embed_seconds=own("embed_seconds_total"),
            encode_seconds=own("encode_seconds_sum"),
            queue_wait_seconds=own("queue_wait_seconds_sum"),
            batches=[
                pb.BatchStatistics(
                    bucket=bucket, batches=counts.batches, rows=counts.rows, generate_seconds=counts.seconds
                )
                for bucket, counts in sorted(self._batches.items())
            ],
            largest_bucket=int(own("largest_bucket")),
            variants_redrawn=int(own("variants_redrawn_total")),
        )


@dataclass
class ClientCounts:
    """What one client got, and when it was last seen, on the clock of the statistics."""

    variants: int = 0
    last_seen: float = 0.0


class Statistics:
    """All that one server process counts. Belongs to one event loop.

    Args:
        device: where the networks run, such as "cpu" or "cuda:0".
        buckets: batch sizes; bounds of the batch size histogram.
        queued_bytes: returns the bytes of requests and finished variants held now.
        clock: seconds that never go back.

    Attributes:
        registry: has every metric.
        waiting: how many variants of each client wait now.
    """

    def __init__(
        self,
        device: str,
        buckets: Sequence[int],
        *,
        queued_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state: State = "loading"
        self.waiting: Counts[str] = Counts()
        self.generators: dict[str, GeneratorCounters] = {}
        self.registry = CollectorRegistry(auto_describe=False)
        self._device, self._queued_bytes, self._clock = device, queued_bytes, clock
        self._started = clock()
        self._recent_lag: deque[tuple[float, float]] = deque()
        self._clients: OrderedDict[str, ClientCounts] = OrderedDict()

        instruments = self._instruments = Instruments(self.registry, buckets)
        instruments.build_info.labels(__version__, device).set(1)
        show_state(instruments.state, STATES, lambda: self.state)
        instruments.draining.set_function(lambda: self.state == "draining")
        instruments.queued_bytes.set_function(queued_bytes)
        instruments.clients.set_function(lambda: len(self.clients()))
        instruments.recent_loop_lag.set_function(lambda: self.recent_loop_lag)
        self._rejected = {reason: instruments.rejected.labels(reason) for reason in REASONS}

    def register(self, generator_id: str) -> GeneratorCounters:
        """Returns new counters for a generator."""
        counters = self.generators[generator_id] = GeneratorCounters(generator_id, self._instruments)
        return counters

    def watch_store(self, state: Callable[[], StoreState]) -> None:
        """Shows from now on what becomes of variants that are to be stored."""
        gauge = self._instruments.gauge(
            "store_state", "1 for what becomes of variants that are to be stored.", ["state"]
        )
        show_state(gauge, STORE_STATES, state)

    def watch_certificate(self, expires: Callable[[], float]) -> None:
        """Shows from now on when the server's certificate expires, in seconds since 1970."""
        gauge = self._instruments.gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "When the server's certificate expires, in seconds since 1970.",
            unit="seconds",
        )
        gauge.set_function(expires)

    def client(self, client_id: str) -> ClientCounts:
        """Returns the counts of a client, of whose name 128 characters count, and notes that it was seen.

        Only the last 256 clients of the last ten minutes are kept, so ask anew for every request. One that has
        variants waiting outlives those that have none.
        """
        name = client_id[:CLIENT_ID_CHARACTERS]
        counts = self._clients.setdefault(name, ClientCounts())
        counts.last_seen = self._clock()
        self._clients.move_to_end(name)
        if len(self._clients) > MOST_CLIENTS:
            others = list(self._clients)[:-1]
            del self._clients[next((other for other in others if not self.waiting[other]), others[0])]
        return counts

    def clients(self) -> dict[str, ClientCounts]:
        """Returns the clients that have variants waiting or were seen in the last ten minutes, the latest last."""
        oldest = self._clock() - CLIENT_SECONDS
        for name in [name for name, seen in self._clients.items() if seen.last_seen < oldest]:
            if not self.waiting[name]:
                del self._clients[name]
        return dict(self._clients)

    def rejected(self, reason: Reason, count: int = 1) -> None:
        """Counts refused requests or items."""
        self._rejected[reason].inc(count)

    def request(self, method: str, code: str, seconds: float) -> None:
        """Counts a finished call, by its gRPC status and the seconds from its first byte to its answer.

        The method is from a fixed set, such as "GenerateVariants": every new one makes a time series.
        """
        self._instruments.requests.labels(method, code).inc()
        self._instruments.request_seconds.labels(method).observe(seconds)

    async def watch_loop(self) -> None:
        """Measures how late the event loop runs what is due, until cancelled; start it as a task."""
        while True:
            due = self._clock() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            self.loop_was_late(self._clock() - due)

    def loop_was_late(self, seconds: float) -> None:
        """Notes one measurement of the event loop's lag."""
        now, late = self._clock(), max(0.0, seconds)
        self._instruments.loop_lag.observe(late)
        self._recent_lag.append((now, late))
        while self._recent_lag[0][0] < now - LAG_WINDOW:
            self._recent_lag.popleft()

    @property
    def recent_loop_lag(self) -> float:
        """The event loop's greatest lag in the last ten seconds, in seconds."""
        oldest = self._clock() - LAG_WINDOW
        return max((late for when, late in self._recent_lag if when >= oldest), default=0.0)

    def to_proto(self) -> pb.GetStatisticsResponse:
        """Returns the answer to GetStatistics; `requests` counts the finished GenerateVariants calls."""
        now = self._clock()
        samples = [sample for family in self.registry.collect() for sample in family.samples]
        values = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}

        def value(name: str, **labels: str) -> float:
            return values.get((f"genssl_{name}", *sorted(labels.items())), 0.0)

        return pb.GetStatisticsResponse(
            version=__version__,
            device=self._device,
            state=self.state,
            uptime_seconds=now - self._started,
            generators=[counters.to_proto(value) for counters in self.generators.values()],
            clients=[
                pb.ClientStatistics(
                    client_id=name,
                    queued_variants=self.waiting[name],
                    variants=counts.variants,
                    seconds_since_last_request=now - counts.last_seen,
                )
                for name, counts in self.clients().items()
            ],
            rejections={reason: int(value("rejected_total", reason=reason)) for reason in REASONS},
            requests=int(value("request_seconds_count", method="GenerateVariants")),
            queued_bytes=self._queued_bytes(),
            event_loop_lag_seconds=self.recent_loop_lag,
        )
