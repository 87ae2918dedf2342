"""`genssl store`: looks after stores of variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genssl.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

    from genssl.variants.store_stats import StoreStatistics

app = typer.Typer(
    help="Check, count, merge, export and import stores of variants.", no_args_is_help=True, rich_markup_mode=None
)
StoreArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A store of variants.", show_default=False)]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="A folder that is absent or empty.", show_default=False)
]


class ExportFormat(StrEnum):
    """What `genssl store export` writes."""

    webdataset = "webdataset"
    folder = "folder"


class ImportEncoding(StrEnum):
    """How `genssl store import` stores images."""

    png = "png"
    raw = "raw"


@app.command("verify")
def verify(folder: StoreArgument) -> None:
    """Check every record's checksum and name, the lists of all sources, and that no commit is lost.

    Exit code 1 if something is damaged.
    """
    from genssl.variants.store_verify import verify as check

    with _progress("checked") as (progress, started):
        found = check(folder, progress, started)
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
    """Count variants, sources and bytes, by generator, format and writer."""
    from rich.console import Console

    from genssl.variants.store_stats import statistics

    with _progress("counted") as (progress, started):
        found = statistics(folder, progress, started)
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
    from genssl.variants.store_merge import merge as unite

    with _progress("merged") as (progress, started):
        done = unite(out, folders, progress, started)
    for line in done.damaged:
        print(line)
    if done.dropped:
        print(f"the stores disagree on {', '.join(done.dropped)} in store.json, which is left out")
    resumed = f", {done.resumed:,} of them by an interrupted merge before" if done.resumed else ""
    print(f"{out}: {counted(done.variants, 'variant')}{resumed}")
    if done.damaged:
        print(f"{out}: {counted(len(done.damaged), 'damaged record was', 'damaged records were')} not copied")
        raise typer.Exit(1)


@app.command("export")
def export(
    folder: StoreArgument,
    out: OutArgument,
    format_: Annotated[
        ExportFormat, typer.Option("--format", help="webdataset: tar shards; folder: one PNG a variant.")
    ] = ExportFormat.webdataset,
    generator: Annotated[
        str | None,
        typer.Option(
            metavar="FINGERPRINT[/PARAMETERS]",
            help="Which variants, if the store holds several kinds; the beginning is enough.",
            show_default=False,
        ),
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest size of a shard in MiB.")] = 256,
) -> None:
    """Write a store's variants as files for other tools, in the order of source and index.

    Files are named <source id>_<index>, with metadata in .json beside each .png of a shard. OUT appears when it is
    complete.

    \b
    genssl store export variants shards
    genssl store export variants pictures --format folder
    """
    from genssl.variants.store_export import export as write

    with _progress("exported") as (progress, started):
        done = write(
            folder,
            out,
            format_.value,
            generator=generator,
            shard_bytes=shard_mb * 2**20,
            progress=progress,
            started=started,
        )
    shards = f" in {counted(done.shards, 'shard')}" if format_ == ExportFormat.webdataset else ""
    print(f"{out}: {counted(done.variants, 'variant')}{shards}, {done.bytes:,} bytes")
    for line in done.lacking:
        print(line)
    if done.damaged or done.lacking:
        left_out = counted(done.damaged, "damaged variant was", "damaged variants were")
        print(f"{out}: {left_out} left out; genssl store verify {folder} names {'it' if done.damaged == 1 else 'them'}")
        raise typer.Exit(1)


@app.command("import")
def import_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Images named <stem>_<k>.JPEG, at any depth.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A store of this generator, or a folder to make one in.", show_default=False
        ),
    ],
    dataset_root: Annotated[
        Path,
        typer.Option(metavar="ROOT", help="The data set, whose images are named <stem>.JPEG.", show_default=False),
    ],
    generator_name: Annotated[
        str, typer.Option(metavar="NAME", help="What made the variants; names them in the store.", show_default=False)
    ],
    licence: Annotated[str, typer.Option(help="Of the variants; kept in the store.")] = "",
    encoding: Annotated[ImportEncoding, typer.Option(help="How images are stored; both are lossless.")] = (
        ImportEncoding.png
    ),
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out images that belong to none of the data set.")
    ] = False,
) -> None:
    """Make a store of variants that another program wrote into a folder laid out like the paper's.

    An interrupted import goes on where it stopped. Exit code 1 if images could not be decoded and were left out.

    \b
    genssl store import icgan-variants store --dataset-root imagenet/train --generator-name icgan --licence CC-BY-NC-4.0
    """
    from genssl.errors import UserError
    from genssl.variants.store_import import import_folder

    if not generator_name.strip():
        raise UserError("--generator-name is empty; name what made the variants, such as icgan-biggan-256")
    with _progress("imported") as (progress, started):
        done = import_folder(
            folder,
            out,
            dataset_root=dataset_root,
            generator_name=generator_name,
            licence=licence,
            encoding=encoding.value,
            skip_unknown=skip_unknown,
            progress=progress,
            started=started,
        )
    for line in done.corrupt:
        print(line)
    before = f", {done.present:,} stored before" if done.present else ""
    unknown = f", {done.unknown:,} of no image in {dataset_root} left out" if done.unknown else ""
    print(f"{out}: {counted(done.variants, 'variant')} imported{before}{unknown}")
    if done.corrupt:
        left_out = counted(len(done.corrupt), "image cannot be decoded and was", "images cannot be decoded and were")
        print(f"{folder}: {left_out} left out")
        raise typer.Exit(1)


@contextmanager
def _progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Yields what advances a bar on a terminal's standard error by a number of variants, and what sets the total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done: progress.advance(task, done), lambda total: progress.update(task, total=total)


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
