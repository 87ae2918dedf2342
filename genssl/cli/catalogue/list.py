"""`genssl list`"""

from __future__ import annotations

from typing import Annotated

import typer


def list_command(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="methods, backbones, generators, evaluators or datasets; by default all.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also licence and cost, where they are known.")
    ] = False,
) -> None:
    """List what recipes can name, plug-ins included.

    \b
    genssl list
    genssl list generators -v
    """
    from rich.console import Console
    from rich.table import Table

    from genssl.errors import UserError, suggest
    from genssl.registry import REGISTRIES

    if kind is not None and kind not in REGISTRIES:
        raise UserError(f"list: {kind!r} is not a kind{suggest(kind, REGISTRIES)}")
    console = Console(highlight=False)
    for name in [kind] if kind else REGISTRIES:
        details = REGISTRIES[name].details() if verbose else {}
        table = Table(title=name, title_justify="left", box=None, show_header=False, padding=(0, 2))
        for entry, summary, origin in REGISTRIES[name].describe():
            table.add_row(f"[bold]{entry}[/bold]", summary, "" if origin == "genssl" else f"from {origin}")
            for word, detail in zip(("licence", "cost"), details.get(entry, ("", "")), strict=True):
                if detail:
                    table.add_row("", f"{word}: {detail}", "")
        console.print(table)
