"""Which environment of a store a process writes: one that nobody else holds, kept by an exclusive lock."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
import socket
from pathlib import Path

import lmdb

from genssl.variants.store.environment import Environment
from genssl.variants.store.manifest import StoreError

log = logging.getLogger(__name__)

WRITERS = "writers"
WRITER_LOCK = "writer.lock"
NETWORK_FILESYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "9p"),
    *("sshfs", "s3fs", "gcsfuse"),
}


def writer_names(folder: Path) -> list[str]:
    """Returns the names of all environments that a store has, ascending."""
    try:
        return sorted(entry.name for entry in (folder / WRITERS).iterdir() if entry.is_dir())
    except OSError:
        return []


def take_writer(folder: Path, map_bytes: int, *, on_network: bool) -> tuple[str, Environment, int]:
    """Takes an environment that nobody writes, or a new one.

    Returns:
        Its name, the environment, and the descriptor that holds the lock: closing it gives the environment back.

    Raises:
        StoreError: if the folder cannot be written.
    """
    host = re.sub(r"[^\w.-]", "_", socket.gethostname()) or "host"
    existing = writer_names(folder)
    # On a network file system other machines' locks may not be seen: only this machine's own are taken over.
    usable = [name for name in existing if not on_network or name.rpartition("-")[0] == host]
    fresh = (name for number in itertools.count() if (name := f"{host}-{number:03d}") not in existing)
    try:
        for name in itertools.chain(usable, fresh):
            descriptor = claim_writer(folder / WRITERS / name)
            if descriptor is None:
                continue
            environment = None
            try:
                environment = Environment.open(folder / WRITERS / name, writable=True, map_bytes=map_bytes)
            except lmdb.Error as error:
                if name not in existing:
                    raise
                log.warning("%s cannot be written: %s; another is taken", folder / WRITERS / name, error)
            finally:
                if environment is None:
                    os.close(descriptor)
            if environment is not None:
                return name, environment, descriptor
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"{folder} cannot be written ({error}); make room or give a folder on a local disk") from None
    raise AssertionError("there is always another name")


def claim_writer(folder: Path) -> int | None:
    """Takes the exclusive lock of a writer's folder, made if absent; returns its descriptor, or None if another has it.

    The kernel drops the lock when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / WRITER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def network_filesystem(path: Path) -> str | None:
    """Returns the type of the network file system that a path lies on, or None, also where it cannot be told."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    resolved = path.resolve()
    best = max(
        (mount for mount in mounts if resolved.is_relative_to(mount[1])), key=lambda mount: len(mount[1]), default=None
    )
    if best is None:
        return None
    kind = best[2].removeprefix("fuse.")
    return kind if kind in NETWORK_FILESYSTEMS or kind in ("sshfs", "s3fs", "gcsfuse") else None
