"""The counters of a server. GetStatistics and the Prometheus metrics are both filled from here.

Everything is a plain number that the server's one event loop changes: no locks, and nothing to pay on the hot path
but an addition. Whoever wants to read from another thread asks the loop (see `metrics.py`).
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from genssl import __version__
from genssl.generation.v1 import generation_pb2 as pb
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

MOST_CLIENTS = 256
CLIENT_SECONDS = 600.0
CLIENT_ID_CHARACTERS = 128  # a client names itself; its name must not cost memory without bound
LAG_PERIOD, LAG_WINDOW = 0.1, 10.0
RECENT_BATCHES = 100

# From a small network on a GPU to a diffusion model with a long queue, three bounds a decade.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Histogram:
    """Counts of observations by upper bound (inclusive), and their sum.

    Args:
        bounds: ascending; a last one, infinity, is added.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds a value that occurred `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        """Observations in all."""
        return sum(self.counts)


@dataclass
class BatchCounters:
    """Batches of one size: how many, the rows in them that were wanted, and their device seconds."""

    batches: int = 0
    rows: int = 0
    seconds: float = 0.0


class GeneratorCounters:
    """The counters of one generator.

    Args:
        generator_id: the name by which requests ask for it.
        buckets: batch sizes; bounds of the batch size histogram.
        queued: returns the rows that wait now, by priority in lower case.
        running: returns the rows on the device now.
        largest_bucket: returns the largest batch size in use now.
        redrawn: returns the draws that drift guards added.
    """

    def __init__(
        self,
        generator_id: str,
        *,
        buckets: Sequence[int],
        queued: Callable[[], Mapping[str, int]],
        running: Callable[[], int],
        largest_bucket: Callable[[], int],
        redrawn: Callable[[], int] = lambda: 0,
    ) -> None:
        self.generator_id = generator_id
        self.queued, self.running, self.largest_bucket, self.redrawn = queued, running, largest_bucket, redrawn
        self.variants: dict[Origin, int] = dict.fromkeys(ORIGINS, 0)
        self.failed = 0
        self.dropped = 0
        self.sources_embedded = 0
        self.embeddings_reused = 0
        self.embed_seconds = 0.0
        self.queue_wait = Histogram(SECONDS)
        self.batch_size = Histogram(buckets)
        self.generate = Histogram(SECONDS)
        self.encode = Histogram(SECONDS)
        self.batches: dict[int, BatchCounters] = {}
        self._recent: deque[tuple[int, int]] = deque(maxlen=RECENT_BATCHES)

    def batch_computed(self, *, bucket: int, rows: int, seconds: float, waits: Iterable[float]) -> None:
        """Counts a batch.

        Args:
            bucket: its size with padding.
            rows: how many of it were wanted.
            seconds: device time.
            waits: for every wanted row, the seconds from its arrival to the start of this batch.
        """
        counters = self.batches.setdefault(bucket, BatchCounters())
        counters.batches += 1
        counters.rows += rows
        counters.seconds += seconds
        self.batch_size.observe(rows)
        self.generate.observe(seconds)
        for wait in waits:
            self.queue_wait.observe(wait)
        self._recent.append((rows, bucket))

    def embedded(self, sources: int, seconds: float) -> None:
        """Counts sources that were embedded in this many seconds of device time."""
        self.sources_embedded += sources
        self.embed_seconds += seconds

    @property
    def occupancy(self) -> float:
        """Wanted rows over computed rows, padding included, in the last 100 batches; 0 before the first."""
        return sum(rows for rows, _ in self._recent) / max(1, sum(bucket for _, bucket in self._recent))

    def to_proto(self) -> pb.GeneratorStatistics:
        """Returns what GetStatistics says of this generator."""
        return pb.GeneratorStatistics(
            generator_id=self.generator_id,
            queued=self.queued(),
            running=self.running(),
            variants_generated=self.variants["generated"],
            variants_from_store=self.variants["store"],
            variants_from_memory=self.variants["memory"],
            variants_shared=self.variants["shared"],
            variants_failed=self.failed,
            variants_dropped=self.dropped,
            sources_embedded=self.sources_embedded,
            embed_seconds=self.embed_seconds,
            encode_seconds=self.encode.sum,
            queue_wait_seconds=self.queue_wait.sum,
            batches=[
                pb.BatchStatistics(
                    bucket=bucket,
                    batches=counters.batches,
                    rows=counters.rows,
                    generate_seconds=counters.seconds,
                )
                for bucket, counters in sorted(self.batches.items())
            ],
            largest_bucket=self.largest_bucket(),
            variants_redrawn=self.redrawn(),
        )


@dataclass
class ClientCounters:
    """What one client got, and when it was last seen, on the clock of the statistics."""

    variants: int = 0
    last_seen: float = 0.0


class Statistics:
    """All counters of one server process. Belongs to one event loop.

    Args:
        device: where the networks run, such as "cpu" or "cuda:0".
        queued_bytes: returns the bytes of requests and finished variants held now.
        queued_of: returns how many variants of a client wait now.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        device: str,
        *,
        queued_bytes: Callable[[], int],
        queued_of: Callable[[str], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.queued_bytes, self._queued_of = device, queued_bytes, queued_of
        self.state: State = "loading"
        self.store_state: Callable[[], StoreState] | None = None
        self.certificate_expires: Callable[[], float] | None = None  # seconds since 1970
        self.generators: dict[str, GeneratorCounters] = {}
        self.rejections: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self.requests: dict[tuple[str, str], int] = {}
        self.request_seconds: dict[str, Histogram] = {}
        self.loop_lag = Histogram(LAG_SECONDS)
        self._recent_lag: deque[tuple[float, float]] = deque()
        self._clients: OrderedDict[str, ClientCounters] = OrderedDict()
        self._clock = clock
        self._started = clock()

    def register(
        self,
        generator_id: str,
        *,
        buckets: Sequence[int],
        queued: Callable[[], Mapping[str, int]],
        running: Callable[[], int],
        largest_bucket: Callable[[], int],
        redrawn: Callable[[], int] = lambda: 0,
    ) -> GeneratorCounters:
        """Returns new counters for a generator; the arguments are those of `GeneratorCounters`."""
        counters = GeneratorCounters(
            generator_id,
            buckets=buckets,
            queued=queued,
            running=running,
            largest_bucket=largest_bucket,
            redrawn=redrawn,
        )
        self.generators[generator_id] = counters
        return counters

    def client(self, client_id: str) -> ClientCounters:
        """Returns the counters of a client and notes that it was seen.

        Only the last 256 clients of the last ten minutes are kept, so ask anew for every request. One that has
        variants waiting outlives those that have none.

        Args:
            client_id: what the client calls itself; all but the first 128 characters is ignored.
        """
        name = client_id[:CLIENT_ID_CHARACTERS]
        counters = self._clients.setdefault(name, ClientCounters())
        counters.last_seen = self._clock()
        self._clients.move_to_end(name)
        if len(self._clients) > MOST_CLIENTS:
            others = list(self._clients)[:-1]
            del self._clients[next((other for other in others if not self._queued_of(other)), others[0])]
        return counters

    def clients(self) -> dict[str, ClientCounters]:
        """Returns the clients that have variants waiting or were seen in the last ten minutes, the latest last."""
        oldest = self._clock() - CLIENT_SECONDS
        for name in [
            name for name, seen in self._clients.items() if seen.last_seen < oldest and not self._queued_of(name)
        ]:
            del self._clients[name]
        return dict(self._clients)

    def rejected(self, reason: Reason, count: int = 1) -> None:
        """Counts refused requests or items."""
        self.rejections[reason] += count

    def request(self, method: str, code: str, seconds: float) -> None:
        """Counts a finished call.

        Args:
            method: from a fixed set, such as "GenerateVariants": every new one makes a time series.
            code: the name of its gRPC status, such as "OK".
            seconds: from its first byte to its answer.
        """
        self.requests[method, code] = self.requests.get((method, code), 0) + 1
        if method not in self.request_seconds:
            self.request_seconds[method] = Histogram(SECONDS)
        self.request_seconds[method].observe(seconds)

    async def watch_loop(self) -> None:
        """Measures how late the event loop runs what is due, until cancelled; start it as a task."""
        while True:
            due = self._clock() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            self.loop_was_late(self._clock() - due)

    def loop_was_late(self, seconds: float) -> None:
        """Notes one measurement of the event loop's lag."""
        now, late = self._clock(), max(0.0, seconds)
        self.loop_lag.observe(late)
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
        return pb.GetStatisticsResponse(
            version=__version__,
            device=self.device,
            state=self.state,
            uptime_seconds=now - self._started,
            generators=[counters.to_proto() for counters in self.generators.values()],
            clients=[
                pb.ClientStatistics(
                    client_id=name,
                    queued_variants=self._queued_of(name),
                    variants=counters.variants,
                    seconds_since_last_request=now - counters.last_seen,
                )
                for name, counters in self.clients().items()
            ],
            rejections={str(reason): count for reason, count in self.rejections.items()},
            requests=sum(count for (method, _), count in self.requests.items() if method == "GenerateVariants"),
            queued_bytes=self.queued_bytes(),
            event_loop_lag_seconds=self.recent_loop_lag,
        )
