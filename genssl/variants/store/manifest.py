"""The manifest of a variant store, `store.json`: its format, the generators it holds, and the one it is pinned to."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from genssl.base.files import lock, write_atomically
from genssl.errors import UserError

try:
    GENSSL = importlib.metadata.version("genssl")
except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    GENSSL = "(not installed)"
FORMAT, VERSION = "genssl-variants", 1
MANIFEST, MANIFEST_LOCK = "store.json", "store.lock"


class StoreError(UserError):
    """A variant store that cannot be opened or used as asked."""


class StoredGenerator(BaseModel):
    """What is known of a generator whose variants a store holds; unknown parts are empty."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = ""
    model: str = ""
    licence: str = ""
    tflops: float | None = None


class StoreManifest(BaseModel):
    """The content of store.json. Keys that a later genssl adds to this format are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    format: str = f"{FORMAT}/{VERSION}"  # "genssl-variants/1"
    created_by: str = ""  # the genssl that made the store
    created: str = ""  # UTC
    generators: dict[str, StoredGenerator] = {}  # by fingerprint, in hexadecimal
    pinned: str | None = None  # fingerprint of the only generator whose variants may be written, or None

    def describe(self, fingerprint: str) -> str:
        """Returns "name (model), fingerprint abc" for messages."""
        known = self.generators.get(fingerprint, StoredGenerator())
        title = " ".join(part for part in (known.name, f"({known.model})" if known.model else "") if part)
        return f"{title + ', ' if title else ''}fingerprint {fingerprint}"


def read_manifest(folder: Path) -> StoreManifest:
    """Reads store.json; raises StoreError if there is none, or it is damaged, not a store's, or of a newer format."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StoreError(
            f"{folder} is not a variant store: it has no {MANIFEST}; give a folder that genssl wrote variants into"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} cannot be read ({error}); check the path and its permissions") from None
    try:
        found = json.loads(text).get("format")
    except (json.JSONDecodeError, AttributeError):
        found = None
    match = re.fullmatch(rf"{FORMAT}/(\d+)", str(found))
    if match is None:
        raise StoreError(
            f"{path} is not the manifest of a variant store: its format is {found!r}, allowed is '{FORMAT}/{VERSION}'; "
            "give another folder, or restore this file from a copy"
        )
    if int(match[1]) > VERSION:
        raise StoreError(
            f"{path} has format {found!r}; this genssl {GENSSL} reads up to '{FORMAT}/{VERSION}': "
            "upgrade genssl, or give another folder"
        )
    try:
        return StoreManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path}: {where}: {first['msg']}; restore this file from a copy") from None


def foreign_to(folder: Path) -> str | None:
    """Returns the name of something in a folder for which no store can be made there, or None.

    A store whose manifest a full disk refused, or whose process was killed before, leaves files that are in no way.
    """
    names = sorted(path.name for path in folder.iterdir())
    if (folder / MANIFEST).exists():  # looked for last: another process may be making the store
        return None
    return next((name for name in names if name != MANIFEST_LOCK and not name.startswith(f".{MANIFEST}")), None)


def create_store(folder: Path) -> None:
    """Makes an empty store of a folder that is absent or empty, or where one was begun; leaves a store as it is.

    Raises StoreError if the folder holds something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (foreign := foreign_to(folder)) is not None:
            raise StoreError(
                f"{folder} is not a variant store, and is not empty (it holds {foreign!r}); give a new or empty folder"
            )
        with _locked(folder):
            if not (folder / MANIFEST).exists():
                created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                write_manifest(folder, StoreManifest(created_by=f"genssl {GENSSL}", created=created))
    except OSError as error:
        raise StoreError(
            f"a variant store cannot be made in {folder} ({error}); give a folder that can be written"
        ) from None


def update_manifest(folder: Path, change: Callable[[StoreManifest], StoreManifest]) -> StoreManifest:
    """Replaces the manifest by `change` of it, atomically and alone; returns the new one."""
    with _locked(folder):
        before = read_manifest(folder)
        after = change(before)
        if after != before:
            write_manifest(folder, after)
        return after


def pinned_to(manifest: StoreManifest, fingerprint: str, folder: Path) -> StoreManifest:
    """Returns the manifest pinned to one generator.

    Raises StoreError, naming both, if the store is pinned to another, or holds variants of another.
    """
    others = [other for other in [manifest.pinned, *manifest.generators] if other not in (None, fingerprint)]
    if others:
        how = "is pinned to" if manifest.pinned == others[0] else "holds variants of"
        raise StoreError(
            f"{folder} {how} the generator {manifest.describe(str(others[0]))}, but this one is "
            f"{manifest.describe(fingerprint)}: variants of different generators must not be mixed here; "
            "give another folder, or use the generator that the store was made with"
        )
    return manifest.model_copy(update={"pinned": fingerprint})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = lock(folder / MANIFEST_LOCK, mode=0o666, wait=True)
    assert descriptor is not None, "it was waited for"
    try:
        yield
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Replaces store.json atomically, whatever it was; for a store that nobody else uses yet."""

    def write(path: Path) -> None:
        path.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        path.chmod(0o644)  # whoever may enter the folder may read what is in it, whatever the writer's umask

    write_atomically(folder / MANIFEST, write, synced=True, shared=True)
