"""Safetensors files of genssl: equal content is equal bytes, and a digest tells when a byte has changed since.

The library writes metadata in another order in every process, and the format has no checksum: a flipped bit of a weight
is read as another weight. Files without a digest, older ones and those of others, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

DIGEST = "genssl_digest"  # key of the metadata
ALIGNMENT = 8  # the format's, of where the tensors begin

Tensors = dict[str, torch.Tensor]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with a digest of its content, and gives it to the disk before it returns.

    Args:
        path: of the file.
        tensors: of any device and dtype.
        metadata: what else readers are told.

    Raises:
        OSError: if the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = dict(metadata or {})
    header, data = _split(save(plain, facts | {DIGEST: digest_of(plain, facts)}))
    with path.open("wb") as file:
        file.write(header_bytes(header))
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # the file is given its name next, which must not reach the disk before the content


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Returns the tensors of a safetensors file on the CPU and its metadata, without the digest.

    Raises:
        OSError: if the file cannot be read.
        SafetensorError: if it is no such file, or its content is not what was written.
    """
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    written = metadata.pop(DIGEST, None)
    if written is not None and written != (found := digest_of(tensors, metadata)):
        raise SafetensorError(
            f"the file is damaged: its tensors have the digest {found}, and those that were written had {written}"
        )
    return tensors, metadata


def digest_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Returns 32 hex digits: BLAKE2b-128 over names, dtypes, shapes and values of tensors and over metadata, sorted."""
    digest = hashlib.blake2b(json.dumps(dict(metadata), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{len(name)}:{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def header_bytes(header: dict[str, object]) -> bytes:
    """Returns the bytes of a safetensors file before its tensors, with the metadata sorted."""
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        header = header | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _split(file: bytes) -> tuple[dict[str, object], memoryview]:
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), memoryview(file)[end:]
