"""How the commands are listed, and what is said of one that does not exist."""

from __future__ import annotations

import difflib
import sys
from typing import Any

from typer.core import TyperGroup

WHOLE = sys.maxsize


class Group(TyperGroup):
    """Commands whose lines of help are wrapped, not cut, and whose names are suggested by their parts too."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes a line or two a command: its whole first sentence."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(WHOLE)) for name, command in commands if command is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the command, or ends with the names that may have been meant."""
        if self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            # A part of a long name, such as `train`, is too far from the whole for difflib.
            parts = [part for name in names for part in name.split("-")]
            meant = {*args[0].split("-"), *difflib.get_close_matches(args[0], parts, 1)}
            near = [name for name in names if meant & set(name.split("-")) or name.startswith(args[0])]
            near += [name for name in difflib.get_close_matches(args[0], names) if name not in near]
            hint = f" Did you mean {' or '.join(repr(name) for name in near[:3])}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)
