"""Checks all that a store holds: records, their names, and the lists of their sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genssl.variants.store.manifest import read_manifest
from genssl.variants.store.scan import Progress
from genssl.variants.store.writers import writer_names


@dataclass
class Verification:
    """What a check found.

    Attributes:
        writers, records, links: how many were looked at.
        uncounted: how many writers have no count of what was committed there, so that lost commits would not be seen.
        damage: one line for everything that is wrong, the writer's name first.
    """

    writers: int = 0
    records: int = 0
    links: int = 0
    uncounted: int = 0
    damage: list[str] = field(default_factory=list)


def verify(
    folder: Path, progress: Progress = lambda done: None, started: Callable[[int], None] = lambda total: None
) -> Verification:
    """Reads a whole store and checks checksums, keys against digests, lists of sources, and the number of records.

    Every writer's environment is read by a process of its own: LMDB trusts its trees, and one that is damaged badly
    enough kills the process that reads it.

    Args:
        folder: of the store; nothing in it is changed.
        progress: called with the number of records checked since its last call.
        started: called with the number of records of the writers begun so far.

    Raises:
        StoreError: if the folder is no store, or its manifest is damaged.
    """
    read_manifest(folder)
    found, total = Verification(), 0
    for name in writer_names(folder):
        found.writers += 1
        for said in _checked(folder, name):
            if "total" in said:
                total += int(said["total"])
                started(total)
            found.records += int(said.get("records", 0))
            found.links += int(said.get("links", 0))
            found.uncounted += int(said.get("uncounted", False))
            progress(int(said.get("records", 0)))
            if "damage" in said:
                found.damage.append(f"{name}: {said['damage']}")
    return found


def _checked(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yields what the process that checks one writer says."""
    command = [sys.executable, "-m", "genssl.variants.store.check", str(folder.absolute()), name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None, "it is a pipe"
            for line in child.stdout:
                said = json.loads(line)
                finished = finished or "finished" in said
                yield said
        except BaseException:
            child.kill()
            raise
    if child.returncode < 0:
        died = f"its tree is so damaged that LMDB died of reading it (signal {-child.returncode})"
        yield {"damage": f"{died}; move its folder away, what it held is made again"}
    elif not finished:
        raise RuntimeError(f"the check of {folder / name} ended with exit code {child.returncode}")
