"""Errors that a user can cause. Each says where, what was found, what is allowed, and what to do.

The command line prints the message alone and exits with code 2. Everything else that escapes is a bug and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

LONGEST_NAME = 100


class UserError(Exception):
    """A mistake or a circumstance that the user can put right; `str(error)` is the whole message."""


class ConfigError(UserError):
    """A recipe, study or server file that does not validate; one line a problem."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A data set that is absent, empty or corrupt."""


class NoLabelsError(DataError):
    """Images without labels, where labels are needed."""


class GeneratorError(UserError):
    """A generator that cannot be loaded or that cannot do what was asked of it."""


class ServerUnavailableError(UserError):
    """The generation server cannot be reached, or stopped answering while a run needed it.

    Attributes:
        retries: calls that had been repeated for the request that failed.
    """

    retries: int = 0


class RequestRefusedError(UserError):
    """The generation server answered and refused: the request will not succeed by being repeated."""


def suggest(found: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean 'x'? allowed: a, b, c" for a message about an unknown name.

    Args:
        found: what the user wrote.
        allowed: every name that would have been accepted; may be empty.
    """
    names = sorted(allowed)
    if not names:
        return "; nothing is allowed here"
    found = found[:LONGEST_NAME]  # the search takes time for every character, and clients of a server choose them
    nearest = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return f"{hint} allowed: {', '.join(names)}"


def fork_message(folder: Path, parent: int) -> str:
    """Returns the message for an LMDB environment that a forked child of process `parent` wants to use.

    LMDB forbids the use of an inherited environment and does not notice it; it refuses to open the folder anew while
    the inherited environment lives.
    """
    return (
        f"{folder} was opened in process {parent} and is used in its forked child {os.getpid()}, which LMDB does not "
        "allow; start workers by forkserver or spawn and open it there, or fork before it is opened"
    )
