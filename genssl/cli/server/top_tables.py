"""What `genssl top` shows of a server's statistics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from genssl.base.wording import counted
from genssl.generation.v1 import generation_pb2 as pb

WINDOW_SECONDS = 10.0  # rates over a single interval would jump with every batch
MOST_CLIENTS = 15
PRIORITIES = ("interactive", "training", "bulk")


class History:
    """The answers of the last ten seconds, which rates are made of.

    Args:
        target: the server's address, for the header.
        clock: seconds that never go back.
    """

    def __init__(self, target: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.target, self.trouble = target, ""
        self._clock = clock
        self._answers: deque[tuple[float, pb.GetStatisticsResponse]] = deque()

    def add(self, answer: pb.GetStatisticsResponse) -> None:
        """Takes the newest answer; a server that was started anew makes the older ones void."""
        now = self._clock()
        if self._answers and answer.uptime_seconds < self.latest.uptime_seconds:
            self._answers.clear()
        self._answers.append((now, answer))
        while len(self._answers) > 2 and self._answers[0][0] < now - WINDOW_SECONDS:
            self._answers.popleft()
        self.trouble = ""

    @property
    def latest(self) -> pb.GetStatisticsResponse:
        """The newest answer."""
        return self._answers[-1][1]

    @property
    def age(self) -> float:
        """Seconds since the newest answer."""
        return self._clock() - self._answers[-1][0]

    @property
    def measured(self) -> bool:
        """Whether rates are of the last seconds; otherwise they are means since the server's start."""
        return len(self._answers) > 1

    def load(self, generator: pb.GeneratorStatistics) -> Load:
        """Returns what a generator of the newest answer has done lately."""
        if not self.measured:
            return _load(generator, pb.GeneratorStatistics(), self.latest.uptime_seconds)
        first = self._answers[0][1]
        before = next((old for old in first.generators if old.generator_id == generator.generator_id), None)
        # The server's own clock: answers may be late.
        seconds = self.latest.uptime_seconds - first.uptime_seconds
        return _load(generator, before or pb.GeneratorStatistics(), seconds)


@dataclass(frozen=True)
class Load:
    """Rates of a generator; None where nothing was computed that could tell.

    Attributes:
        variants_per_second: delivered, of every origin.
        occupancy: wanted rows over computed rows.
        wait: mean seconds of a computed row from arrival to the start of its batch.
        batch: mean device seconds of a batch.
    """

    variants_per_second: float
    occupancy: float | None
    wait: float | None
    batch: float | None


def _load(now: pb.GeneratorStatistics, before: pb.GeneratorStatistics, seconds: float) -> Load:
    batches, rows, computed, device = (a - b for a, b in zip(_batches(now), _batches(before), strict=True))
    wait = now.queue_wait_seconds - before.queue_wait_seconds
    return Load(
        variants_per_second=(sum(_origins(now).values()) - sum(_origins(before).values())) / max(seconds, 1e-3),
        occupancy=rows / computed if computed else None,
        wait=wait / rows if rows else None,
        batch=device / batches if batches else None,
    )


def _batches(generator: pb.GeneratorStatistics) -> tuple[float, float, float, float]:
    """Returns batches, wanted rows, computed rows and device seconds over all sizes."""
    return (
        sum(size.batches for size in generator.batches),
        sum(size.rows for size in generator.batches),
        sum(size.batches * size.bucket for size in generator.batches),
        sum(size.generate_seconds for size in generator.batches),
    )


def _origins(generator: pb.GeneratorStatistics) -> dict[str, int]:
    return {
        "generated": generator.variants_generated,
        "store": generator.variants_from_store,
        "memory": generator.variants_from_memory,
        "shared": generator.variants_shared,
    }


def screen(history: History) -> RenderableType:
    """Returns header, generators, clients and refusals."""
    answer = history.latest
    header = Text(_header(history), style="bold")
    parts: list[RenderableType] = [header]
    if history.trouble:
        parts.append(Text(_trouble(history), style="bold red"))
    parts.append(_generators(history))
    if answer.clients:
        parts.append(_clients(answer.clients))
    parts.append(Text(_refused(answer)))
    return Group(*parts)


def lines(history: History) -> list[str]:
    """Returns one line a generator, or the one that says what the trouble is."""
    now = time.strftime("%H:%M:%S")
    if history.trouble:
        return [f"{now} {_trouble(history)}"]
    found = []
    for generator in history.latest.generators:
        load = history.load(generator)
        cells = (
            ("queued", f"{sum(generator.queued.values())}"),
            ("running", f"{generator.running}"),
            ("variants/s", f"{load.variants_per_second:.1f}"),
            ("occupancy", _share(load.occupancy)),
            ("wait", _seconds(load.wait)),
            ("batch", _seconds(load.batch)),
        )
        found.append(f"{now} {_plain(generator.generator_id)} " + " ".join(f"{name}={cell}" for name, cell in cells))
    return found or [f"{now} {history.latest.state}: no generator is loaded"]


def _header(history: History) -> str:
    answer = history.latest
    facts = (
        f"genssl {_plain(answer.version)} at {history.target}",
        _plain(answer.device),
        _plain(answer.state),
        f"up {_duration(answer.uptime_seconds)}",
        f"event loop lag {1000 * answer.event_loop_lag_seconds:.0f} ms",
        counted(answer.requests, "request"),
        f"{answer.queued_bytes / 2**20:.1f} MiB held",
    )
    return " | ".join(facts)


def _trouble(history: History) -> str:
    return f"no answer for {history.age:.0f} s ({_plain(history.trouble)}); trying again"


def _generators(history: History) -> Table:
    table = Table(title="generators", title_justify="left")
    table.add_column("generator")
    for priority in PRIORITIES:
        table.add_column(priority, justify="right")
    rate = "variants/s" if history.measured else "variants/s since start"
    for heading in ("running", rate, "occupancy", "mean wait", "s/batch", "largest"):
        table.add_column(heading, justify="right")
    table.add_column("origins")
    for generator in history.latest.generators:
        load = history.load(generator)
        table.add_row(
            _cell(generator.generator_id),
            *(f"{generator.queued.get(priority, 0):,}" for priority in PRIORITIES),
            f"{generator.running:,}",
            f"{load.variants_per_second:,.1f}",
            _share(load.occupancy),
            _seconds(load.wait),
            _seconds(load.batch),
            f"{generator.largest_bucket}",
            _split(generator),
        )
    return table


def _clients(clients: Iterable[pb.ClientStatistics]) -> Table:
    busiest = sorted(clients, key=lambda client: (-client.queued_variants, -client.variants, client.client_id))
    table = Table(title="clients, the busiest first", title_justify="left")
    table.add_column("client")
    for heading in ("queued", "variants", "last seen"):
        table.add_column(heading, justify="right")
    for client in busiest[:MOST_CLIENTS]:
        table.add_row(
            _cell(client.client_id or "(no name)"),
            f"{client.queued_variants:,}",
            f"{client.variants:,}",
            f"{_duration(client.seconds_since_last_request)} ago",
        )
    if len(busiest) > MOST_CLIENTS:
        table.caption = f"and {len(busiest) - MOST_CLIENTS} more"
    return table


def _refused(answer: pb.GetStatisticsResponse) -> str:
    counts = sorted(((count, reason) for reason, count in answer.rejections.items() if count), reverse=True)
    return "refused: " + (", ".join(f"{_plain(reason)} {count:,}" for count, reason in counts) or "none")


def _split(generator: pb.GeneratorStatistics) -> str:
    origins = _origins(generator)
    total = sum(origins.values())
    shares = [f"{name} {count / total:.0%}" for name, count in origins.items() if count]
    lost = ((generator.variants_failed, "failed"), (generator.variants_dropped, "dropped"))
    return ", ".join(shares + [f"{name} {count:,}" for count, name in lost if count])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}s" if value < 10 else f"{value:.1f}s"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _plain(text: str) -> str:
    """Returns text that cannot steer the terminal: clients name themselves, and what they send is not ours."""
    return "".join(character if character.isprintable() else "?" for character in text)[:64]


def _cell(text: str) -> Text:
    return Text(_plain(text))
