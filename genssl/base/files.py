"""The files of a run directory. Everything is written beside its place and moved there whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path and moves the result to `path`; a crash leaves the old file or none."""
    partial = path.with_name(f".{path.name}.part")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON (which is YAML too)."""
    write_atomically(
        path, lambda partial: partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n") and None
    )
