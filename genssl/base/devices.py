"""Devices, threads, and random streams that belong to nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from genssl.base.cores import usable_cores
from genssl.errors import UserError


def pick_device(name: str) -> torch.device:
    """Returns the device of a config: "auto" is the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {name}: this machine has {torch.cuda.device_count()} usable CUDA devices; "
            "set device (train.device in a recipe) to auto, cpu, or the number of one of them"
        )
    return device


def set_threads(threads: int | Literal["auto"], *, shared_with: int = 0, among: int = 1) -> int:
    """Sets torch's intra-op threads; returns the number.

    Args:
        threads: the number, or "auto" for all usable cores.
        shared_with: cores that "auto" leaves to others.
        among: how many processes share the rest under "auto".
    """
    count = max(1, (usable_cores() - shared_with) // among) if threads == "auto" else threads
    torch.set_num_threads(count)
    return count


def stream(*parts: object) -> torch.Generator:
    """Returns a CPU random stream named by `parts`: equal parts, equal stream, on every machine, in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def seeded_initialisation(*parts: object) -> Iterator[None]:
    """Inside, torch's default CPU stream, from which modules draw their first weights, is seeded by `parts`.

    Afterwards it is as it was before.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed every CUDA device as well.
        torch.default_generator.manual_seed(stream(*parts).initial_seed())
        yield
