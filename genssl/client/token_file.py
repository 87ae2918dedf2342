"""Reads a client's bearer token."""

from __future__ import annotations

from pathlib import Path

from genssl.errors import UserError


def read_token_file(path: Path, where: str) -> str:
    """Returns the token that a file holds.

    Args:
        path: of a file with the token alone; white space around it is no part of it.
        where: the option or key path that named the file, for the error.

    Raises:
        UserError: if the file cannot be read or holds no token.
    """
    try:
        token = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"{where}: {path} cannot be read ({reason}); give a file with the token alone in it") from None
    if not (token and token.isascii() and token.isprintable()):
        raise UserError(f"{where}: {path} holds no token; put the server's token, and nothing else, into it")
    return token
