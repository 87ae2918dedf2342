"""Home directories in paths, `~` and `~user`: shells expand them at the start of a word alone, YAML nowhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

SOCKET = "unix:"


def expand_home(value: Any) -> Any:
    """Returns a path, or an address unix:PATH, with its leading ~ expanded; also those within lists and mappings.

    Anything else is returned as it is, a ~ of an unknown user too.
    """
    if isinstance(value, Path):
        return Path(os.path.expanduser(value)) if value.parts[:1] and value.parts[0].startswith("~") else value  # noqa: PTH111
    if isinstance(value, str):
        scheme = SOCKET if value.startswith(SOCKET) else ""
        path = value.removeprefix(scheme)
        return scheme + os.path.expanduser(path) if path.startswith("~") else value  # noqa: PTH111
    if type(value) in (list, tuple):
        return type(value)(expand_home(item) for item in value)
    if type(value) is dict:
        return {key: expand_home(item) for key, item in value.items()}
    return value
