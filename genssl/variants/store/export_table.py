"""What an export says of its images: `export.json` of all of them, `variants.csv` of each.

A row names the four things that the variant is a function of, the digest that follows from them (`key`), and the digest
of its pixels. So an import finds out whether a file is the one that was exported, whatever its name.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from genssl.data.base import UInt8Array, raw_image
from genssl.data.sources import SourceFacts
from genssl.errors import DataError
from genssl.variants.key import VariantKey
from genssl.variants.store.manifest import GENSSL, StoredGenerator

TABLE, DESCRIPTION = "variants.csv", "export.json"
FORMAT, VERSION = "genssl-export", 2
PARAMETER = "parameter."  # before a parameter's name, in the table
COLUMNS = (
    *("file", "shard", "key", "source_id", "dataset", "split", "row", "path", "label", "label_name", "index", "seed"),
    *("fingerprint", "parameters", "channels", "height", "width", "pixels"),
)
WriteRow = Callable[[str, str, dict[str, Any]], object]  # takes file, shard and metadata


class Shard(BaseModel):
    """A tar of an export, with its size when it was written."""

    name: str
    variants: int
    bytes: int


class Description(BaseModel):
    """The content of export.json."""

    model_config = ConfigDict(extra="allow")

    format: str  # "genssl-export-folder/2" or "genssl-export-webdataset/2"
    created_by: str = f"genssl {GENSSL}"  # the genssl that wrote it
    fingerprint: str  # fingerprint and parameters: of all the variants, in hexadecimal, see `VariantKey`
    parameters: str
    # the parameters by name; None if the store does not know them
    parameter_values: dict[str, int | float] | None = None
    generator: StoredGenerator = StoredGenerator()  # what the store knows of the generator
    pinned: bool = False  # whether the store is pinned to it
    manifest: dict[str, Any] = {}  # what else its manifest says, for a store that is made of the export
    variants: int  # how many
    shards: list[Shard] | None = None  # the tars; None for a folder


def metadata_of(
    key: VariantKey, image: UInt8Array, source: SourceFacts | None, values: Mapping[str, int | float] | None
) -> dict[str, Any]:
    """Returns what the .json beside an image says; None for what is not known."""
    channels, height, width = image.shape
    return {
        "key": key.digest().hex(),
        "source_id": key.source_id.hex(),
        **(asdict(source) if source is not None else dict.fromkeys(SourceFacts.__annotations__)),
        "index": key.index,
        "seed": key.seed(),
        "fingerprint": key.fingerprint.hex(),
        "parameters": key.parameters.hex(),
        "parameter_values": dict(values) if values is not None else None,
        "channels": channels,
        "height": height,
        "width": width,
        "pixels": pixels_digest(image),
    }


def pixels_digest(image: UInt8Array) -> str:
    """Returns 32 hex digits for pixels uint8 [C, h, w], whatever file they came from; as the id of a raw source."""
    return raw_image(image).source_id.hex()


def open_table(folder: Path, mode: str) -> IO[str]:
    """Opens variants.csv; names of files that are not UTF-8 keep their bytes."""
    return (folder / TABLE).open(mode, encoding="utf-8", errors="surrogateescape", newline="")


def table_writer(file: IO[str], parameters: list[str]) -> WriteRow:
    """Returns what writes a row; every parameter gets a column, and what is None is empty."""
    # All text in quotes: a carriage return is left without them where lines end in a newline alone.
    rows = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    rows.writerow([*COLUMNS, *(PARAMETER + name for name in parameters)])

    def write(name: str, shard: str, told: dict[str, Any]) -> None:
        row, values = {**told, "file": name, "shard": shard}, told["parameter_values"] or {}
        rows.writerow([*(row[column] for column in COLUMNS), *(values[name] for name in parameters)])

    return write


@dataclass(frozen=True)
class ExportedVariant:
    """A row of the table."""

    file: str  # name of the image, in its shard if there is one
    shard: str  # name of the tar; "" in a folder
    key: VariantKey  # of the variant
    shape: tuple[int, int, int]  # [C, h, w]
    pixels: str  # digest, see `pixels_digest`


def read_description(folder: Path) -> Description:
    """Reads export.json; raises DataError if there is none, if it is damaged, or of an older or newer genssl."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise DataError(f"{folder} is not an export of a store: it has no {DESCRIPTION}")
    try:
        found = Description.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise DataError(f"{path} cannot be read ({why}); restore it, or export the store again") from None
    kind, _, version = found.format.rpartition("/")
    if not kind.startswith(f"{FORMAT}-") or not version.isdecimal():
        raise DataError(f"{path} is not a description of an export: its format is {found.format!r}")
    if int(version) < VERSION:
        raise DataError(
            f"{path} has format {found.format!r}, which does not say all that a store needs; export the store again "
            f"with this genssl {GENSSL}"
        )
    if int(version) > VERSION:
        raise DataError(f"{path} has format {found.format!r}; this genssl {GENSSL} reads {VERSION}: upgrade genssl")
    return found


def read_table(folder: Path, description: Description) -> Iterator[ExportedVariant]:
    """Yields the rows of variants.csv; raises DataError if it is absent or cut short, or if a row was changed."""
    path, number = folder / TABLE, 0
    try:
        with open_table(folder, "r") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                yield _checked(f"{path}:{number + 1}", row, description)
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it, or export the store again") from None
    if number != description.variants:
        raise DataError(
            f"{path} has {number:,} rows, {DESCRIPTION} says {description.variants:,}; restore it, or export the store "
            "again"
        )


def _checked(where: str, row: Mapping[str, Any], description: Description) -> ExportedVariant:
    try:
        names = [bytes.fromhex(row[name]) for name in ("source_id", "fingerprint", "parameters")]
        key = VariantKey(names[0], names[1], names[2], int(row["index"]))
        shape = (int(row["channels"]), int(row["height"]), int(row["width"]))
        if (
            {len(name) for name in names} == {16}
            and 0 <= key.index < 2**64
            and key.digest().hex() == row["key"]
            and (key.fingerprint.hex(), key.parameters.hex()) == (description.fingerprint, description.parameters)
        ):
            return ExportedVariant(row["file"], row["shard"], key, shape, row["pixels"])
    except (KeyError, TypeError, ValueError):
        pass
    raise DataError(
        f"{where}: this row is not as it was exported: its key does not follow from source, generator, parameters and "
        "index; restore the table, or export the store again"
    )
