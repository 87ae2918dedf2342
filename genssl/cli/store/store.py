"""`genssl store`: looks after stores of variants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genssl.base.wording import counted
from genssl.cli.store.files import OutArgument, StoreArgument, export, import_, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from genssl.variants.store.scan import StoreStatistics

app = typer.Typer(
    help="Check, count, merge, export and import stores of variants.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("verify")
def verify(folder: StoreArgument) -> None:
    """Check every record's checksum and name, the lists of all sources, and that no commit is lost.

    Exit code 1 if something is damaged.

    \b
    genssl store verify variants
    """
    from genssl.variants.store.verify import verify as check

    with progress_bar("checked") as progress:
        found = check(folder, progress)
    for line in found.damage:
        print(line)
    looked_at = (
        f"{counted(found.records, 'record')} and {counted(found.links, 'link')} of {counted(found.writers, 'writer')}"
    )
    if found.damage:
        print(f"{folder}: {len(found.damage):,} damaged of {looked_at}; what is damaged is treated as absent")
        raise typer.Exit(1)
    print(f"{folder}: {looked_at}, all intact")
    if found.uncounted:
        print(
            f"{folder}: {found.uncounted} writer{'s have' if found.uncounted > 1 else ' has'} no count of what was "
            "committed, as an earlier genssl left it, so that lost commits would not be seen"
        )


@app.command("stats")
def stats(folder: StoreArgument) -> None:
    """Count variants, sources and bytes, by generator, format and writer.

    \b
    genssl store stats variants
    """
    from rich.console import Console

    from genssl.variants.store.scan import statistics

    with progress_bar("counted") as progress:
        found = statistics(folder, progress)
    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no edge to wrap at
        console.width = 160
    console.print(_table(folder, found))


@app.command("merge")
def merge(
    out: OutArgument,
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Stores of variants.", show_default=False)],
) -> None:
    """Make one store of the variants of several; the same bytes whatever their order.

    An interrupted merge goes on where it stopped; OUT appears when it is complete. Exit code 1 if damaged records were
    left out.

    \b
    genssl store merge all node1 node2 node3
    """
    from genssl.variants.store.merge import merge as unite

    with progress_bar("merged") as progress:
        done = unite(out, folders, progress)
    for line in done.damaged:
        print(line)
    if done.dropped:
        print(f"the stores disagree on {', '.join(done.dropped)} in store.json, which is left out")
    resumed = f", {done.resumed:,} of them by an interrupted merge before" if done.resumed else ""
    print(f"{out}: {counted(done.variants, 'variant')}{resumed}")
    if done.damaged:
        print(f"{out}: {counted(len(done.damaged), 'damaged record was', 'damaged records were')} not copied")
        raise typer.Exit(1)


app.command("export")(export)
app.command("import")(import_)


def _table(folder: Path, found: StoreStatistics) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(folder)), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    copies = found.records - found.variants
    table.add_row("variants", f"{found.variants:,}" + (f" (and {copies:,} copies)" if copies else ""))
    table.add_row("sources", f"{found.sources:,}")
    if found.per_source:
        mean = found.variants / found.sources
        least, most = min(found.per_source), max(found.per_source)
        table.add_row("variants of a source: least, mean, most", f"{least:,}  {mean:,.2f}  {most:,}")
    table.add_row("bytes of records", f"{found.record_bytes:,}")
    table.add_row("bytes of files", f"{found.file_bytes:,}")
    table.add_section()
    for fingerprint, variants in found.per_generator.most_common():
        pinned = ", pinned" if found.manifest.pinned == fingerprint else ""
        licence = found.manifest.generators[fingerprint].licence if fingerprint in found.manifest.generators else ""
        table.add_row(
            escape(f"generator {found.manifest.describe(fingerprint)}{', ' + licence if licence else ''}{pinned}"),
            counted(variants, "variant"),
        )
    table.add_section()
    for (encoding, (channels, height, width)), (records, size) in sorted(found.formats.items()):
        table.add_row(f"{encoding}, {channels} x {height} x {width}", f"{counted(records, 'record')}, {size:,} bytes")
    table.add_section()
    for name, writer in found.writers.items():
        damage = f", {writer.damage}" if writer.damage else ""
        table.add_row(
            escape(f"writer {name}{damage}"), f"{counted(writer.records, 'record')}, {writer.file_bytes:,} bytes"
        )
    return table
