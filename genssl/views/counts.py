"""Counts that all the processes of a DataLoader add to."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch

LOCK_SECONDS = 5.0  # an addition takes microseconds; who holds the lock longer was killed with it


class SharedCounts:
    """Whole numbers by name, in shared memory: every process that was given this object adds to the same ones.

    Given to a child, it shares; pickled in any other way, such as to another machine, it becomes one of its own that
    begins with the counts so far.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._counts = torch.zeros(len(self._names), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._lock = _new_lock()

    def add(self, amounts: Mapping[str, int]) -> dict[str, int]:
        """Adds to the named counts and returns what they are now; nothing of other processes' additions is lost."""
        held = self._lock.acquire(timeout=LOCK_SECONDS)
        try:
            for name, amount in amounts.items():
                self._counts[self._names.index(name)] += amount
            return {name: self[name] for name in amounts}
        finally:
            if held:
                self._lock.release()

    def __getitem__(self, name: str) -> int:
        return int(self._counts[self._names.index(name)])

    def __getstate__(self) -> dict[str, Any]:
        # A lock can only be sent to a child while that is being started.
        return {**self.__dict__, "_lock": self._lock if get_spawning_popen() is not None else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = state["_lock"] or _new_lock()


def _new_lock() -> Any:
    # A lock of the default context, fork, is not taken by children that are started in another way; this one by all.
    return multiprocessing.get_context("spawn").Lock()
