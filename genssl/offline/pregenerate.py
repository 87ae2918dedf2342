"""Fills a variant store ahead of training: resumable, shardable, and safe to kill at any moment.

What is there is never made again, and a batch is stored in one transaction, so there is no state besides the store.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from genssl.base.cores import usable_cores
from genssl.base.devices import pick_device, set_threads
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.data.load import left_out_note
from genssl.data.sources import read_source_ids
from genssl.errors import UserError
from genssl.evaluators.splits import load_splits
from genssl.server.process import EmbeddedServer
from genssl.training.supply.open import OpenSource, open_in_process, open_remote, with_store
from genssl.training.supply.server import server_file, server_threads
from genssl.training.supply.stores import refuse_foreign
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest, VariantSource
from genssl.variants.store.facts import StoredNames, known_fingerprints
from genssl.variants.store.record import Encoding
from genssl.variants.store.source import StoredVariants

READ_AT_ONCE = 1024
PIECES_AHEAD = 2  # beyond those in flight, so that a server never waits for this process


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: a range of rows, so that all variants of an image lie in one shard."""

    index: int = 0
    count: int = 1

    def rows(self, images: int) -> range:
        """Returns the rows of this shard of a data set of so many images."""
        return range(self.index * images // self.count, (self.index + 1) * images // self.count)


EVERYTHING = Shard()


@dataclass
class Pregenerated:
    """What came of it."""

    total: int  # distinct variants of this shard
    there: int = 0  # of them, in the store already, or put there meanwhile by someone else
    made: int = 0  # of them, made and stored now
    seconds: float = 0.0  # of wall time, start-up left out
    generator_seconds: float = 0.0  # of the generator's device


class Report(Protocol):
    """Who is told how far it is."""

    def note(self, text: str) -> None:
        """Takes a line for the user."""
        ...

    def start(self, done: Pregenerated) -> None:
        """Hears that the generator is ready, and what is to be made."""
        ...

    def advance(self, done: Pregenerated) -> None:
        """Hears that more variants are in the store."""
        ...


def parse_shard(text: str | None) -> Shard:
    """Returns the shard that "i/n" names; without a text, the one of torchrun's RANK and WORLD_SIZE, or everything."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    where, found = "--shard", text
    if text is None:
        if rank is None or world is None:
            return Shard()
        where, found = "RANK and WORLD_SIZE", f"{rank}/{world}"
    match = re.fullmatch(r"(\d+)/(\d+)", found or "")
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(
            f"{where}: {found!r} is not a shard; give i/n with 0 <= i < n, such as 0/4, 1/4, 2/4 and 3/4 for four of "
            "them"
        )
    return Shard(int(match[1]), int(match[2]))


def pregenerate(
    recipe: Recipe,
    folder: Path,
    *,
    variants: int,
    report: Report,
    shard: Shard = EVERYTHING,
    rows: int = 64,
    encoding: Encoding = "raw",
    check: bool = False,
) -> Pregenerated:
    """Makes variants 0..variants-1 of every training image of a recipe, as far as the store lacks them.

    In this process, or through servers if the recipe's `variants.source` is online. The views section of the recipe
    does not matter. What the user can put right is a UserError; what was stored stays.

    Args:
        recipe: has data set and generator.
        folder: of the store; made if it is absent.
        variants: of each image.
        report: is told how far it is.
        shard: the part to make.
        rows: variants in a request, and in a transaction of the store.
        encoding: of the images that are written.
        check: reads what is stored, to make damaged variants again; otherwise its names are enough.
    """
    # --- open the data set, the generator and the store ---
    if recipe.generator is None:
        raise UserError(
            "pregenerate: the recipe has no generator block; add one, such as that of recipes/simclr_sd.yaml"
        )
    refuse_foreign(folder, "--store")
    for warning in recipe.generator.warnings():
        report.note(f"warning: generator.{warning}")
    recipe = _on_own_device(recipe)
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        # torchrun's ranks on this machine share its cores; more threads than cores make them crawl.
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        set_threads(recipe.train.threads, shared_with=usable_cores() - usable_cores() // ranks)
    dataset = load_splits(recipe.model_copy(update={"evaluate": []})).train
    if left_out := left_out_note(dataset):
        report.note(left_out)
    ledger = Ledger()
    with ExitStack() as stack:
        opened = _open(recipe, dataset, ledger, device, rows, stack, known_fingerprints(recipe, folder))
        stack.callback(lambda: opened.source.close())  # by then it may have a store before it
        if unsuited := recipe.unsuited() or opened.smaller_than(dataset.image_size):
            report.note(f"warning: {unsuited}")
        stored = with_store(opened, recipe, dataset, folder, strict=True, encoding=encoding, variants=variants)
        # --- find out what is to be made ---
        source_ids = _source_ids(dataset, shard.rows(len(dataset)))
        lacking = _lacking(stored, source_ids, variants, check=check)
        done = Pregenerated(total=lacking.size, there=int(lacking.size - lacking.sum()))
        report.start(done)
        # --- make it ---
        ahead = 0
        if opened.remote is not None:
            ahead = recipe.variants.max_in_flight * max(1, len(recipe.variants.targets)) + PIECES_AHEAD
        started = time.perf_counter()
        for number, piece in _announced(opened.source, _pieces(source_ids, lacking, rows), ahead):
            origins = opened.source.take(piece, number).origins
            done.made += origins.count("generated")
            done.there += len(origins) - origins.count("generated")
            done.seconds = time.perf_counter() - started
            done.generator_seconds = ledger.generator_seconds
            report.advance(done)
        return done


def _on_own_device(recipe: Recipe) -> Recipe:
    """Returns the recipe with torchrun's LOCAL_RANK as GPU in place of "auto", or every rank would take the first."""
    local = os.environ.get("LOCAL_RANK", "")
    if recipe.train.device != "auto" or not local.isdecimal() or not torch.cuda.is_available():
        return recipe
    train = recipe.train.model_copy(update={"device": f"cuda:{int(local) % torch.cuda.device_count()}"})
    return recipe.model_copy(update={"train": train})


def _open(
    recipe: Recipe,
    dataset: ImageDataset,
    ledger: Ledger,
    device: torch.device,
    rows: int,
    stack: ExitStack,
    known: Sequence[str],
) -> OpenSource:
    """Opens what makes the variants, for a store that knows some; a server of its own is left to `stack`."""
    if recipe.variants.source != "online":
        return open_in_process(recipe, dataset, ledger, device, known)
    server = None
    if recipe.variants.server == "embedded":
        # Nothing trains beside it, so it may have the whole machine, unless its bits depend on the number of threads.
        threads: int | Literal["auto"] = (
            server_threads(recipe) if recipe.variants.batching == "deterministic" else "auto"
        )
        server = stack.enter_context(EmbeddedServer(server_file(recipe, threads, known)))
    changed = recipe.variants.model_copy(update={"late": "block", "rows_per_request": rows})
    patient = recipe.model_copy(update={"variants": changed})
    return open_remote(patient, dataset, ledger, server, client_id="genssl pregenerate", priority="bulk")


def _source_ids(dataset: ImageDataset, rows: range) -> dict[int, bytes]:
    """Returns row -> source id; of rows with equal images the first alone, since they share their variants."""
    first: dict[bytes, int] = {}
    for row, name in read_source_ids(dataset, rows):
        first.setdefault(name, row)
    return {row: name for name, row in first.items()}


def _lacking(
    stored: StoredVariants, source_ids: dict[int, bytes], variants: int, *, check: bool
) -> npt.NDArray[np.bool_]:
    """Returns bool [images, variants]: what the store does not have."""
    names = list(source_ids.values())
    found = np.zeros((len(names), variants), np.bool_)
    contents = StoredNames(stored.store)
    for start in range(0, len(names), READ_AT_ONCE):
        part = names[start : start + READ_AT_ONCE]
        for index in range(variants):
            digests = [key.digest() for key in stored.facts.keys(part, [index] * len(part))]
            if check:
                found[start : start + len(part), index] = [image is None for image in stored.store.get_many(digests)]
            else:
                found[start : start + len(part), index] = contents.lack(digests)
    return found


def _pieces(source_ids: dict[int, bytes], lacking: npt.NDArray[np.bool_], rows: int) -> Iterator[list[VariantRequest]]:
    """Yields what is to be made, image by image, `rows` variants at a time."""
    images = list(source_ids.items())
    wanted = (
        VariantRequest(*images[position], int(index))
        for position in np.flatnonzero(lacking.any(axis=1))
        for index in np.flatnonzero(lacking[position])
    )
    while piece := list(islice(wanted, rows)):
        yield piece


def _announced(
    source: VariantSource, pieces: Iterator[list[VariantRequest]], ahead: int
) -> Iterator[tuple[int, Sequence[VariantRequest]]]:
    """Yields every piece with its number, after it and the `ahead` following ones were announced."""
    coming: deque[tuple[int, list[VariantRequest]]] = deque()
    for numbered in enumerate(pieces):
        source.announce(numbered[1], numbered[0])
        coming.append(numbered)
        if len(coming) > ahead:
            yield coming.popleft()
    yield from coming
