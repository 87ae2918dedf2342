"""`genssl store`: looks after stores of variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genssl.base.wording import counted

if TYPE_CHECKING:
    from rich.table import Table

    from genssl.variants.store.stats import StoreStatistics

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

    \b
    genssl store verify variants
    """
    from genssl.variants.store.verify import verify as check

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
    """Count variants, sources and bytes, by generator, format and writer.

    \b
    genssl store stats variants
    """
    from rich.console import Console

    from genssl.variants.store.stats import statistics

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
    from genssl.variants.store.merge import merge as unite

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
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Where path and label of the sources are looked up: a data set, or {name: folder, root: photos}. "
            "By default the one of the recipe that filled the store.",
            show_default=False,
        ),
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest size of a shard in MiB.")] = 256,
) -> None:
    """Write a store's variants as files for other tools, in the order of source and index.

    Files are named <source id>_<index>. The .json beside each .png, and a row of variants.csv, say what it was made of:
    path and label of the source, index, seed, parameters, fingerprint of the generator. OUT appears when it is
    complete; genssl store import makes a store of it again.

    \b
    genssl store export variants shards
    genssl store export variants pictures --format folder \\
        --dataset '{name: folder, root: photos}'
    """
    from genssl.cli.store.sources import sources_of
    from genssl.variants.store.export import export as write

    sources, note = sources_of(folder, dataset)
    with _progress("exported") as (progress, started):
        done = write(
            folder,
            out,
            format_.value,
            generator=generator,
            sources=sources,
            shard_bytes=shard_mb * 2**20,
            progress=progress,
            started=started,
        )
    shards = f" in {counted(done.shards, 'shard')}" if format_ == ExportFormat.webdataset else ""
    print(f"{out}: {counted(done.variants, 'variant')}{shards}, {done.bytes:,} bytes")
    if note:
        print(note)
    for line in sources.problems if done.unknown and sources is not None else ():
        print(line)
    if done.unknown:
        print(
            f"{out}: {counted(done.unknown, 'source is', 'sources are')} not in the data set, so path and label of its "
            "variants are empty"
        )
    if not done.parameters:
        print(f"{out}: the store knows the parameters by their digest alone, so their values are empty")
    for line in done.lacking:
        print(line)
    if done.damaged or done.lacking:
        left_out = counted(done.damaged, "damaged variant was", "damaged variants were")
        print(f"{out}: {left_out} left out; genssl store verify {folder} names {'it' if done.damaged == 1 else 'them'}")
        raise typer.Exit(1)


@app.command("import")
def import_(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="What genssl store export wrote, or images named <stem>_<k>.JPEG, at any depth.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A store of this generator, or a folder to make one in.", show_default=False
        ),
    ],
    dataset_root: Annotated[
        Path | None,
        typer.Option(
            metavar="ROOT",
            help="For another program's images: the data set, whose images are named <stem>.JPEG.",
            show_default=False,
        ),
    ] = None,
    generator_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For another program's images: what made them; names them in the store.",
            show_default=False,
        ),
    ] = None,
    licence: Annotated[str, typer.Option(help="Of another program's images; kept in the store.")] = "",
    encoding: Annotated[ImportEncoding, typer.Option(help="How images are stored; both are lossless.")] = (
        ImportEncoding.png
    ),
    skip_unknown: Annotated[
        bool,
        typer.Option(
            "--skip-unknown",
            help="Leave out images that belong to none of the data set, or that an export does not name or lacks.",
        ),
    ] = False,
) -> None:
    """Make a store of what genssl store export wrote, or of variants that another program wrote.

    Those of another program lie in a folder laid out like the paper's, and need --dataset-root and --generator-name. An
    interrupted import goes on where it stopped. Exit code 1 if images are damaged or gone and were left out.

    \b
    genssl store import shards store
    genssl store import icgan-variants store --dataset-root imagenet/train \\
        --generator-name icgan --licence CC-BY-NC-4.0
    """
    from genssl.errors import UserError
    from genssl.variants.store.table import DESCRIPTION

    how: dict[str, Any] = {"encoding": encoding.value, "skip_unknown": skip_unknown}
    foreign = dataset_root is not None or generator_name is not None
    if not foreign and (folder / DESCRIPTION).is_file():
        if licence:
            raise UserError(f"--licence: {folder / DESCRIPTION} names the licence; leave the option out")
        _import_export(folder, out, how)
        return
    if dataset_root is None or generator_name is None:
        missing = "--dataset-root" if dataset_root is None else "--generator-name"
        raise UserError(
            f"{missing} is missing: {folder} has no {DESCRIPTION}, so it is no export of a store; for images of "
            "another program give both --dataset-root ROOT and --generator-name NAME"
            if not foreign
            else f"{missing} is missing; images of another program need both --dataset-root and --generator-name, and "
            "what genssl store export wrote needs neither"
        )
    if not generator_name.strip():
        raise UserError("--generator-name is empty; name what made the variants, such as icgan-biggan-256")
    from genssl.variants.store.import_folder import import_folder

    with _progress("imported") as (progress, started):
        done = import_folder(
            folder,
            out,
            dataset_root=dataset_root,
            generator_name=generator_name,
            licence=licence,
            progress=progress,
            started=started,
            **how,
        )
    unknown = f", {done.unknown:,} of no image in {dataset_root} left out" if done.unknown else ""
    _say_imported(folder, out, done.variants, done.present, unknown, done.corrupt, "that cannot be decoded")


def _import_export(folder: Path, out: Path, how: dict[str, Any]) -> None:
    from genssl.variants.store.restore import restore

    with _progress("imported") as (progress, started):
        done = restore(folder, out, progress=progress, started=started, **how)
    unknown = f", {counted(done.unknown, 'image')} in no row of the table left out" if done.unknown else ""
    absent = f", {done.absent:,} without a file left out" if done.absent else ""
    _say_imported(folder, out, done.variants, done.present, unknown + absent, done.corrupt, "other than exported")
    if done.absent:
        raise typer.Exit(1)


def _say_imported(
    folder: Path, out: Path, variants: int, present: int, left_out: str, corrupt: list[str], how: str
) -> None:
    """Prints what an import did; exit code 1 if images were left out because of what is in them."""
    for line in corrupt:
        print(line)
    before = f", {present:,} stored before" if present else ""
    print(f"{out}: {counted(variants, 'variant')} imported{before}{left_out}")
    if corrupt:
        print(f"{folder}: left out: {counted(len(corrupt), 'image')} {how}")
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
