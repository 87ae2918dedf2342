"""What a server writes to standard error: lines for people, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from genssl.errors import UserError, suggest

# What a record may carry beside its message. A list of what is allowed: images and tokens cannot slip through it.
FIELDS = ("request_id", "client", "generator", "variants", "wait_ms", "generate_ms")
LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "GENSSL_LOG_LEVEL"
LONGEST_FIELD = 256


def set_up_logging(kind: Literal["human", "json"], stream: TextIO | None = None) -> None:
    """Sends the log of this process to standard error, in place of whatever was set up before.

    genssl's own messages begin at the level that the environment variable GENSSL_LOG_LEVEL names (info by default; at
    debug there is a line a request), those of other libraries at info or above.

    Raises:
        UserError: if GENSSL_LOG_LEVEL names no level.
    """
    level = os.environ.get(LEVEL_VARIABLE, "info").lower()
    if level not in LEVELS:
        raise UserError(f"environment variable {LEVEL_VARIABLE}: {level!r} is not a level{suggest(level, LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        _JSONFormatter() if kind == "json" else _HumanFormatter("%(asctime)s %(levelname)s %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
    logging.getLogger("genssl").setLevel(level.upper())


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Returns the known extras of a record, texts cut to 256 characters."""
    found: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(record, name, None)
        if isinstance(value, str):
            found[name] = value[:LONGEST_FIELD]
        elif isinstance(value, float):
            found[name] = round(value, 3)
        elif isinstance(value, int):
            found[name] = value
    return found


class _HumanFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        # As JSON, since clients name themselves: a line break in a name must not forge a line of the log.
        extras = " ".join(f"{name}={json.dumps(value)}" for name, value in fields_of(record).items())
        return " ".join(filter(None, (super().formatMessage(record), extras)))


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
