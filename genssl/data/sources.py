"""Finds images of data sets by their names: which image it is, where it lies, and what its label is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from genssl.data.base import ImageDataset, Split, path_of
from genssl.errors import UserError

READING_THREADS = 8  # a source's name is a digest of its file
READ_AT_ONCE = 1024


@dataclass(frozen=True)
class SourceFacts:
    """What a data set knows of a source. Of equal images it is the first."""

    dataset: str  # registry name of the data set
    split: Split  # "train" or "test"
    row: int  # number of the image in the split
    path: str | None  # of the file, below the data set's root; None if the images are no files
    label: int | None  # label and label_name: number and name of the class; None if the image has none
    label_name: str | None


class Sources:
    """The images of data sets by the names under which variants know them.

    Args:
        splits: "train" or "test", and what loads that split; in the order in which they are looked through, and loaded
            only if what came before lacks a source. `problems` has why some could not be loaded.
    """

    def __init__(self, splits: Sequence[tuple[Split, Callable[[], ImageDataset]]]) -> None:
        self._splits = splits
        self._loaded: list[tuple[Split, ImageDataset]] = []
        self._found: dict[bytes, tuple[int, int]] = {}  # by name: which split, and the row in it
        self.problems: list[str] = []

    def look_for(self, wanted: Iterable[bytes]) -> int:
        """Reads the data sets until every wanted source is found; returns how many are in none."""
        missing = set(wanted)
        for split, load in self._splits:
            if not missing:
                break
            try:
                dataset = load()
                self._loaded.append((split, dataset))
                for row, source_id in read_source_ids(dataset, range(len(dataset))):
                    if source_id in missing:
                        missing.remove(source_id)
                        self._found[source_id] = (len(self._loaded) - 1, row)
                        if not missing:
                            break
            except UserError as error:  # many have the train split alone; what is not found is counted
                self.problems.append(str(error))
        return len(missing)

    def of(self, source_id: bytes) -> SourceFacts | None:
        """Returns what is known of a source that was looked for; None if it was not found."""
        if source_id not in self._found:
            return None
        number, row = self._found[source_id]
        split, dataset = self._loaded[number]
        label = dataset.label(row)
        names = dataset.class_names
        return SourceFacts(
            dataset.name,
            split,
            row,
            path_of(dataset, row),
            label if label >= 0 else None,
            names[label] if names is not None and label >= 0 else None,
        )


def read_source_ids(dataset: ImageDataset, rows: range) -> Iterator[tuple[int, bytes]]:
    """Yields rows and the names of their images; several files are read at once."""
    with ThreadPoolExecutor(READING_THREADS, thread_name_prefix="genssl-reader") as threads:
        for start in range(0, len(rows), READ_AT_ONCE):
            part = rows[start : start + READ_AT_ONCE]
            yield from zip(part, threads.map(dataset.source_id, part), strict=True)
