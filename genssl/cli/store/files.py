"""`genssl store export` and `import`: a store's variants as files, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genssl.base.wording import counted

if TYPE_CHECKING:
    from genssl.config.base import ComponentConfig
    from genssl.data.base import ImageDataset, Split
    from genssl.data.sources import Sources
    from genssl.variants.store.scan import Progress

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


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Yields what shows a number of variants as a bar on a terminal's standard error."""
    from rich import progress as bars
    from rich.console import Console

    from genssl.variants.store.scan import Progress

    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        class Bar(Progress):
            def start(self, total: int) -> None:
                bar.update(task, total=total)

            def advance(self, done: int) -> None:
                bar.advance(task, done)

        yield Bar()


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
    from genssl.variants.store.export import export as write

    sources, note = _sources_of(folder, dataset)
    with progress_bar("exported") as progress:
        done = write(
            folder,
            out,
            format_.value,
            generator=generator,
            sources=sources,
            shard_bytes=shard_mb * 2**20,
            progress=progress,
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


def _sources_of(store: Path, dataset: str | None) -> tuple[Sources | None, str | None]:
    """Returns where the sources of a store are looked up, in what --dataset gave or what its manifest names.

    There may be nothing of both: then it returns None, and a line that says so.

    Raises:
        UserError: if a given data set cannot be had, or the store cannot be read.
    """
    from genssl.config.load import parse_blocks
    from genssl.data.load import load_dataset
    from genssl.data.sources import Sources
    from genssl.variants.store.facts import dataset_blocks
    from genssl.variants.store.manifest import read_manifest

    def splits(config: ComponentConfig) -> list[tuple[Split, Callable[[], ImageDataset]]]:
        return [("train", partial(load_dataset, config, "train")), ("test", partial(load_dataset, config, "test"))]

    if dataset is not None:
        train, test = splits(parse_blocks("dataset", [dataset])[0])
        loaded = train[1]()  # what was asked for must be there
        return Sources([("train", lambda: loaded), test]), None
    named = [block for text in dataset_blocks(read_manifest(store)) for block in _readable(text)]
    if not named:
        return None, f"{store} does not name its data set: path and label are empty; give --dataset"
    return Sources([split for block in named for split in splits(block)]), None


def _readable(block: dict[str, Any]) -> list[ComponentConfig]:
    """Returns the block that a manifest holds, if this genssl understands it; nothing is downloaded for it."""
    from genssl.config.load import parse_blocks
    from genssl.errors import UserError

    try:
        return parse_blocks("dataset", [json.dumps({name: block[name] for name in block if name != "download"})])
    except UserError:
        return []


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
    from genssl.variants.store.export_table import DESCRIPTION
    from genssl.variants.store.import_folder import import_export, import_folder

    how: dict[str, Any] = {"encoding": encoding.value, "skip_unknown": skip_unknown}
    # --- what genssl store export wrote ---
    if dataset_root is None and generator_name is None and (folder / DESCRIPTION).is_file():
        if licence:
            raise UserError(f"--licence: {folder / DESCRIPTION} names the licence; leave the option out")
        with progress_bar("imported") as progress:
            done = import_export(folder, out, progress=progress, **how)
        left_out = f", {counted(done.unknown, 'image')} in no row of the table left out" if done.unknown else ""
        left_out += f", {done.absent:,} without a file left out" if done.absent else ""
        reason = "other than exported"
    else:  # --- another program's images ---
        root, name = _both(folder, dataset_root, generator_name)
        with progress_bar("imported") as progress:
            done = import_folder(
                folder, out, dataset_root=root, generator_name=name, licence=licence, progress=progress, **how
            )
        left_out = f", {done.unknown:,} of no image in {root} left out" if done.unknown else ""
        reason = "that cannot be decoded"
    # --- what came of it ---
    for line in done.corrupt:
        print(line)
    before = f", {done.present:,} stored before" if done.present else ""
    print(f"{out}: {counted(done.variants, 'variant')} imported{before}{left_out}")
    if done.corrupt:
        print(f"{folder}: left out: {counted(len(done.corrupt), 'image')} {reason}")
    if done.corrupt or done.absent:
        raise typer.Exit(1)


def _both(folder: Path, dataset_root: Path | None, generator_name: str | None) -> tuple[Path, str]:
    """Returns what names the images of another program; raises UserError if something of it is missing."""
    from genssl.errors import UserError
    from genssl.variants.store.export_table import DESCRIPTION

    if dataset_root is None or generator_name is None:
        missing = "--dataset-root" if dataset_root is None else "--generator-name"
        raise UserError(
            f"{missing} is missing: {folder} has no {DESCRIPTION}, so it is not an export of a store; for images of "
            "another program give both --dataset-root ROOT and --generator-name NAME"
            if dataset_root is None and generator_name is None
            else f"{missing} is missing; images of another program need both --dataset-root and --generator-name, and "
            "what genssl store export wrote needs neither"
        )
    if not generator_name.strip():
        raise UserError("--generator-name is empty; name what made the variants, such as icgan-biggan-256")
    return dataset_root, generator_name
