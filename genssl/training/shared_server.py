"""The embedded server of a run with several ranks: one a machine, started by the first rank there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from genssl.config.recipe import Recipe
from genssl.errors import ServerUnavailableError
from genssl.serving.embedded import EmbeddedServer
from genssl.training.distributed import Ranks
from genssl.training.sources import start_server


class JoinedServer(EmbeddedServer):
    """The server that another rank of this machine started, and ends.

    Args:
        address: of its socket.
        pid: its process.
        log_path: its log.
        ranks: the one that started it is among them.
    """

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

    Args:
        recipe: of the run.
        out: the run directory, which gets the server's log.
        ranks: of the run.
        known: see `start_server`.
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
