"""Where `genssl store export` looks up the sources of variants."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genssl.variants.store.sources import Sources

if TYPE_CHECKING:
    from genssl.config.base import ComponentConfig
    from genssl.data.base import ImageDataset, Split


def sources_of(store: Path, dataset: str | None) -> tuple[Sources | None, str | None]:
    """Returns the data set in which the sources of a store are looked up, or None with a line that says why not.

    Args:
        store: whose manifest may name the data set.
        dataset: what --dataset gave: a name, or a block as in a recipe.

    Raises:
        UserError: if a given data set cannot be had, or the store cannot be read.
    """
    from genssl.config.protocol import parse_blocks
    from genssl.data.load import load_dataset
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
    from genssl.config.protocol import parse_blocks
    from genssl.errors import UserError

    try:
        return parse_blocks("dataset", [json.dumps({name: block[name] for name in block if name != "download"})])
    except UserError:
        return []
