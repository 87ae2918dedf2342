"""A bank: images with the embeddings of one encoder, and exact neighbours in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from genssl.base.files import write_atomically
from genssl.base.safetensors_file import read_tensors, write_tensors
from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.data.load import load_dataset
from genssl.errors import GeneratorError
from genssl.generators.retrieval.configs import BankConfig

FORMAT = "genssl-bank/1"
BATCH = 64
READERS = 4
SAME = 1e-6  # a cosine so near to 1 is the source itself, or a copy of it
SPARE = 16  # candidates beyond those asked for, of which the exact order is worked out


class Bank:
    """Images and their embeddings float32 [N, D]; read-only.

    Attributes:
        dataset: the images.
        digest: 16 bytes over the images' names in order.
    """

    def __init__(self, dataset: ImageDataset, digest: bytes, embeddings: torch.Tensor, device: torch.device) -> None:
        self.dataset, self.digest = dataset, digest
        self._embeddings = embeddings
        self._units = F.normalize(embeddings.to(device), dim=1)

    def __len__(self) -> int:
        return len(self._embeddings)

    def embedding(self, row: int) -> torch.Tensor:
        """Returns the embedding float32 [D] of an image."""
        return self._embeddings[row]

    def neighbours(self, embedding: torch.Tensor, count: int) -> list[int]:
        """Returns the rows of the `count` images nearest to an embedding [D] by cosine, nearest first, ties by row.

        The image that the embedding is of, and copies of it, are left out: there may be fewer rows. Each embedding is
        searched for by itself, and in float64, so that the order does not depend on what else is asked.
        """
        unit = F.normalize(embedding.double(), dim=0)
        rough = self._units @ unit.to(self._units.device, torch.float32)
        most = min(len(self), count + SPARE)
        while True:
            rows = rough.topk(most).indices.cpu().sort().values
            cosines = F.normalize(self._embeddings[rows].double(), dim=1) @ unit
            order = torch.argsort(cosines, descending=True, stable=True)
            found = [int(rows[one]) for one in order if cosines[one] < 1 - SAME]
            if len(found) >= count or most == len(self):
                return found[:count]
            most = min(len(self), 2 * most)

    def drawn(self, embedding: torch.Tensor, count: int, seed: int) -> int:
        """Returns one of the neighbours, each as likely as the other, as the seed says; GeneratorError without any."""
        rows = self.neighbours(embedding, count)
        if not rows:
            raise GeneratorError("the bank has no image but copies of the source; give it more images")
        digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8, person=b"genssl/bank").digest()
        return rows[int.from_bytes(digest, "little") * len(rows) >> 64]


def open_bank(
    config: BankConfig,
    preprocess: Callable[[UInt8Array], UInt8Array],
    embed: Callable[[torch.Tensor], torch.Tensor],
    encoder: bytes,
    device: torch.device,
    former: Callable[[], bytes] | None = None,
) -> Bank:
    """Embeds a bank's images, or reads the embeddings that an earlier call kept.

    The `encoder`, 16 bytes, names it with its preprocessing; `former` returns another name, which kept embeddings may
    go by.

    Raises:
        GeneratorError: if the file is of other images or another encoder, broken, or cannot be written.
        DataError: if the images cannot be had.
    """
    dataset = load_dataset(config.images, "train")
    if len(dataset) < 2:
        raise GeneratorError(f"bank {config.images.name}: has one image, and neighbours need more; add some")
    digest = _digest(dataset)
    facts = {"format": FORMAT, "images": digest.hex(), "encoder": encoder.hex()}
    path = config.embeddings
    if path is not None and path.exists():
        return Bank(dataset, digest, _read(path, facts, len(dataset), former), device)
    if path is not None and not path.parent.is_dir():
        raise GeneratorError(f"bank.embeddings: the folder {path.parent} does not exist; make it, or give another file")
    embeddings = torch.cat([embed(batch).float().cpu() for batch in _batches(dataset, preprocess)])
    if not torch.isfinite(embeddings).all():
        raise GeneratorError(f"bank {config.images.name}: the encoder makes NaN or infinite embeddings of its images")
    if path is not None:
        _write(path, embeddings, facts)
    return Bank(dataset, digest, embeddings, device)


def _digest(dataset: ImageDataset) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor(READERS, thread_name_prefix="genssl-bank") as threads:
        for source_id in threads.map(dataset.source_id, range(len(dataset))):
            digest.update(source_id)
    return digest.digest()


def _batches(dataset: ImageDataset, preprocess: Callable[[UInt8Array], UInt8Array]) -> Iterator[torch.Tensor]:
    """Yields uint8 [B, 3, S, S]; sources are read as stored, as those of a run are."""

    def read(row: int) -> UInt8Array:
        return preprocess(decode(dataset.stored(row)))

    with ThreadPoolExecutor(READERS, thread_name_prefix="genssl-bank") as threads:
        for start in range(0, len(dataset), BATCH):
            images = list(threads.map(read, range(start, min(start + BATCH, len(dataset)))))
            yield torch.from_numpy(np.stack(images))


def _read(path: Path, facts: dict[str, str], count: int, former: Callable[[], bytes] | None) -> torch.Tensor:
    try:
        tensors, metadata = read_tensors(path)
        embeddings = tensors["embeddings"]
    except (OSError, SafetensorError, KeyError) as error:
        raise GeneratorError(f"bank.embeddings: {path} cannot be read ({error}); delete it to make it anew") from None
    for fact, what in (("format", "format"), ("images", "set of images"), ("encoder", "encoder")):
        if metadata.get(fact) == facts[fact]:
            continue
        if fact != "encoder" or former is None or metadata.get(fact) != former().hex():
            raise GeneratorError(
                f"bank.embeddings: {path} is of another {what}; delete it to make it anew, or give another file"
            )
    if embeddings.ndim != 2 or len(embeddings) != count:
        raise GeneratorError(f"bank.embeddings: {path} has not one embedding an image; delete it to make it anew")
    return embeddings


def _write(path: Path, embeddings: torch.Tensor, facts: dict[str, str]) -> None:
    try:
        write_atomically(path, lambda partial: write_tensors(partial, {"embeddings": embeddings}, facts), shared=True)
    except (OSError, SafetensorError) as error:
        raise GeneratorError(f"bank.embeddings: {path} cannot be written ({error}); give another file") from None
