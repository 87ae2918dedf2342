"""The name of a generator: a digest of everything that its images depend on besides source, parameters and index."""

from __future__ import annotations

import hashlib
from pathlib import Path

# Read from disk by people, not by the model.
IGNORED = {"README.md", "card.json", ".gitattributes", "quality.json", "progress.json"}


def fingerprint_folder(folder: Path, *facts: str) -> bytes:
    """Returns 16 bytes: BLAKE2b-128 over the relative path and content of every file of a model, and over `facts`.

    Args:
        folder: a model folder; cards, hidden files and pictures in it do not count.
        facts: what else the images depend on, such as the sampler's version and the dtype.
    """
    digest = hashlib.blake2b(digest_size=16)
    for fact in facts:
        digest.update(f"fact:{len(fact)}:{fact}".encode())
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if (
            not path.is_file()
            or relative.name in IGNORED
            or path.suffix in (".png", ".md")
            or any(p.startswith(".") for p in relative.parts)
        ):
            continue
        digest.update(f"file:{relative.as_posix()}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.digest()


def fingerprint_file(path: Path) -> bytes:
    """Returns 16 bytes: BLAKE2b-128 over the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
