"""How many cores this process may use. Imports no torch, so that decoding workers need not."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
