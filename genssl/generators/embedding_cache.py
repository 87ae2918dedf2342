"""Embeddings of sources on disk, so that a data set is embedded once and its conditioner need not stay in memory.

An LMDB environment (memory-mapped, transactional, several processes at once) from source id to float16 [D], and beside
it `embeddings.json`, which names the conditioner: another one's embeddings are never mixed in.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import torch

from genssl.errors import GeneratorError, fork_message

log = logging.getLogger(__name__)

FORMAT = "genssl-embeddings/1"
MANIFEST = "embeddings.json"
MAP_BYTES = 2**36  # of address space; the file grows with what it holds. 64 GB are 40 million embeddings of 768 numbers
MAX_READERS = 1024


class DiskEmbeddings:
    """The embeddings [D] of one conditioner in one folder. Any thread, and any number of processes of one machine.

    Not usable across fork: a child may use neither what it inherits nor, as long as that lives, the folder.

    Raises:
        GeneratorError: if the folder holds embeddings of another conditioner, is something else, or cannot be used; in
            a forked child of a process that has it open, here and in every method.
    """

    def __init__(self, folder: Path, conditioner: bytes, width: int) -> None:
        self.folder, self.conditioner, self.width = folder, conditioner, width
        self._failed = False
        self._pid = os.getpid()
        if (inherited := _opened.get(str(folder.resolve()))) is not None:
            inherited._check_process()
        _agree(folder, {"format": FORMAT, "conditioner": conditioner.hex(), "width": width, "dtype": "float16"})
        try:
            self._env: Any = lmdb.open(str(folder), map_size=MAP_BYTES, max_readers=MAX_READERS, readahead=False)
            self._env.reader_check()
        except (lmdb.Error, OSError) as error:
            raise GeneratorError(f"generator.embedding_cache: {folder} cannot be opened ({error})") from None
        _opened[str(folder.resolve())] = self

    def __len__(self) -> int:
        self._check_process()
        return int(self._env.stat()["entries"])

    def get(self, source_id: bytes) -> torch.Tensor | None:
        """Returns the embedding float32 [D], or None."""
        self._check_process()
        with self._env.begin(buffers=True) as transaction:
            value = transaction.get(source_id)
            if value is None or len(value) != 2 * self.width:
                return None
            return torch.from_numpy(np.frombuffer(value, "<f2").astype(np.float32))

    def put(self, source_ids: Sequence[bytes], embeddings: Sequence[torch.Tensor]) -> None:
        """Keeps embeddings float32 [D], rounded, all or none; a full disk is logged once, and they are not kept."""
        self._check_process()
        values = [embedding.numpy().astype("<f2").tobytes() for embedding in embeddings]
        try:
            with self._env.begin(write=True) as transaction:
                for source_id, value in zip(source_ids, values, strict=True):
                    transaction.put(source_id, value)
        except lmdb.Error as error:
            if not self._failed:
                log.error("%s keeps no more embeddings (%s); they are computed anew instead", self.folder, error)
            self._failed = True

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise GeneratorError(f"generator.embedding_cache: {fork_message(self.folder, self._pid)}")


_opened: WeakValueDictionary[str, DiskEmbeddings] = WeakValueDictionary()
_opening = threading.Lock()


def _new_lock() -> None:
    global _opening
    _opening = threading.Lock()


# Another thread may have held it at the fork; the child must get its GeneratorError, not a deadlock.
os.register_at_fork(after_in_child=_new_lock)


def open_embeddings(folder: str, conditioner: bytes, width: int) -> DiskEmbeddings:
    """Opens a folder, or shares what this process has open of it; see `DiskEmbeddings`."""
    path = Path(folder).resolve()
    with _opening:
        held = _opened.get(str(path))
        if held is None:
            return DiskEmbeddings(path, conditioner, width)
        held._check_process()
        if (held.conditioner, held.width) != (conditioner, width):
            raise _foreign(path, held.conditioner.hex(), conditioner.hex())
        return held


def kept_conditioner(folder: str) -> bytes | None:
    """Returns the 16 bytes that name the conditioner of a folder's embeddings; None if it has none that can be read."""
    try:
        return bytes.fromhex(json.loads((Path(folder) / MANIFEST).read_text())["conditioner"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def rounded(embeddings: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Returns embeddings float32 [D] as they come back from disk; raises GeneratorError if float16 cannot hold one."""
    found = [embedding.half().float() for embedding in embeddings]
    if not all(embedding.isfinite().all() for embedding in found):
        raise GeneratorError(
            "generator.embedding_cache: an embedding has numbers beyond float16, or none; leave embedding_cache out"
        )
    return found


def _agree(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest if there is none, at once; refuses the folder if it is another's."""
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if other := [entry.name for entry in folder.iterdir() if not entry.name.startswith(f".{MANIFEST}")]:
                raise GeneratorError(
                    f"generator.embedding_cache: {folder} holds something else ({min(other)}); give a new folder"
                )
            descriptor, temporary = tempfile.mkstemp(prefix=f".{MANIFEST}", dir=folder)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(json.dumps(facts, indent=2) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).chmod(0o644)
                os.link(temporary, path)  # unlike a rename, fails where another process was first
            except FileExistsError:
                pass
            finally:
                Path(temporary).unlink()
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GeneratorError(f"generator.embedding_cache: {folder} cannot be used ({error})") from None
    if found != facts:
        known = found.get("conditioner") if isinstance(found, dict) else None
        raise _foreign(folder, str(known), str(facts["conditioner"]))


def _foreign(folder: Path, known: str, wanted: str) -> GeneratorError:
    return GeneratorError(
        f"generator.embedding_cache: {folder} holds embeddings of another conditioner ({known[:12]}) than this "
        f"generator's ({wanted[:12]}); give another folder, or the generator that it was made with"
    )
