"""The embedded server of a run: what it serves, and one a machine of several ranks, started by the first one there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from genssl.base.cores import usable_cores
from genssl.base.ranks import Ranks
from genssl.config.limits import MESSAGE_ROOM, LimitsConfig
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile
from genssl.data.decode import MAX_BYTES, MAX_PIXELS
from genssl.errors import ServerUnavailableError
from genssl.server.process import EmbeddedServer
from genssl.variants.store.facts import known_fingerprints

# What an embedded server may hold for its one run: enough for pictures as large as the reader takes.
EMBEDDED_BYTES = 4 * 2**30


@contextmanager
def start_server(recipe: Recipe, log_path: Path, known: Sequence[str] = ()) -> Iterator[EmbeddedServer | None]:
    """Starts the embedded server if the recipe wants one; it loads while the caller prepares the training.

    Its generator gets the fingerprints `known`, or else those of the recipe's store; see `open_generator`.
    """
    if not recipe.uses_variants() or recipe.variants.source != "online" or recipe.variants.server != "embedded":
        yield None
        return
    with EmbeddedServer(server_file(recipe, server_threads(recipe), known), log_path) as server:
        yield server


def server_file(recipe: Recipe, threads: int | Literal["auto"], known: Sequence[str] = ()) -> ServerFile:
    """Returns what an embedded server serves with so many threads: every picture that the data sets' reader takes."""
    assert recipe.generator is not None
    return ServerFile(
        device=recipe.train.device,
        threads=threads,
        buckets=recipe.variants.buckets,
        batching=recipe.variants.batching,
        limits=LimitsConfig(
            max_image_bytes=MAX_BYTES,
            max_image_pixels=MAX_PIXELS,
            max_message_bytes=MAX_BYTES + MESSAGE_ROOM,
            max_request_pixels=max(10**9, recipe.variants.rows_per_request * MAX_PIXELS),
            max_memory_bytes=EMBEDDED_BYTES,
        ),
        known_fingerprints=sorted(known or known_fingerprints(recipe)),
        generators=[recipe.generator],
    )


def server_threads(recipe: Recipe) -> int:
    """Returns how many torch threads an embedded server uses: half the cores, since the trainer works beside it.

    Under `batching: deterministic` it is the trainer's number, where the recipe has one: sums of floating-point numbers
    depend on how many threads share them, and in-process generation uses the trainer's.
    """
    if recipe.variants.batching == "deterministic" and recipe.train.threads != "auto":
        return recipe.train.threads
    return max(1, usable_cores() // 2)


class JoinedServer(EmbeddedServer):
    """The server that another rank of this machine started, and ends."""

    def __init__(self, address: str, pid: int, log_path: Path, ranks: Ranks) -> None:
        self._folder, self.address, self.log_path = Path(address.removeprefix("unix:")).parent, address, log_path
        self._pid, self._ranks = pid, ranks

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._pid

    def check(self) -> None:
        """Raises ServerUnavailableError if the server process has ended."""
        self._ranks.raise_if_failed()
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            raise ServerUnavailableError(
                f"the generation server of this run (process {self._pid} at {self.address}) has ended; its log is "
                f"{self.log_path}"
            ) from None

    def stop(self) -> None:
        """Leaves the server to the rank that started it."""


@contextmanager
def start_shared_server(
    recipe: Recipe, out: Path, ranks: Ranks, known: Sequence[str] = ()
) -> Iterator[EmbeddedServer | None]:
    """Starts the embedded server if the recipe wants one and this rank is the first of its machine; else finds it.

    The run directory `out` gets its log; for `known` see `start_server`.
    """
    name = f"server/{ranks.node}"
    log_path = out / ("server.log" if ranks.node == 0 else f"server-{ranks.node}.log")
    if ranks.size == 1 or ranks.local == 0:
        with start_server(recipe, log_path, known) as server:
            ranks.tell(name, f"{server.pid} {server.address}" if server is not None else "none")
            yield server
        return
    told = ranks.hear(name)
    if told == "none":
        yield None
        return
    pid, _, address = told.partition(" ")
    yield JoinedServer(address, int(pid), log_path, ranks)
