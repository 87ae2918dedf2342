"""The name of a generator: a digest of everything that its images depend on besides source, parameters and index.

It covers what is loaded: weights, and configs as their values, so that neither another file in the folder nor blank
space in a config makes stored variants worthless. Of an ordinary folder, which holds nothing else and whose configs are
as the libraries write them, the digest is that of the files as they lie there.

Once every file of the folder was covered. The name by that rule, `Fingerprint.former`, says at least as much: what goes
by it in an old store was made by the files that are loaded now; see `genssl.generators.open.open_generator`.

Where genssl itself has come to make other variants of the same files, a fact says so, in the former name too, so that
nothing made before goes by today's name: `preprocess=clip/2`, since sources of a CLIP are resized before they are cut
(`preprocess: square` keeps the name and the variants of before; a store does not know whether its sources are squares,
of which the variants are equal), `crop=pixel`, since an official IC-GAN's square is cut out to a whole pixel as in the
official code, and `thresholding` and `limited`, since these fields of a scheduler are followed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from genssl.base.safetensors_file import DIGEST, header_bytes

# Read from disk by people. Of a card the models read the licence, on which no image depends, and whether genssl trained
# them, from which their rule of preprocessing follows: the rule itself is among the facts.
IGNORED = {"README.md", "card.json", ".gitattributes", "quality.json", "progress.json"}
BLOCK = 2**22
VARIANTS = ("fp16", "bf16")
# What a tokenizer's folder has for it, of whichever kind it is.
TOKENIZER = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
DATA = ("merges.txt", "tokenizer.json", "vocab.json")  # of which the bytes count, as those of weights
WIDE = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")  # which transformers writes in UTF-8


@dataclass(frozen=True)
class Fingerprint:
    """The name of a model, or of a part of one.

    Attributes:
        digest: 16 bytes.
        former: returns the 16 bytes that it had when every file of its folder counted; reads all of them.
    """

    digest: bytes
    former: Callable[[], bytes]


Fact = str | tuple[str, Fingerprint]
"""What else images depend on; a pair is the text, then the fingerprint in hexadecimal."""


def fingerprint_model(
    folder: Path, files: Collection[str], *facts: Fact, keep_order: Collection[str] = ()
) -> Fingerprint:
    """Returns the name of a model: BLAKE2b-128 over the relative path and content of its files, and over `facts`.

    The `files` are what is loaded, see `network_files` and its like; those that are absent do not count. Those in
    `keep_order` are configs of genssl, which are not written in the order of their keys.
    """
    digest = hashlib.blake2b(digest_size=16)
    for fact in facts:
        text = fact if isinstance(fact, str) else f"{fact[0]}{fact[1].digest.hex()}"
        digest.update(f"fact:{len(text)}:{text}".encode())
    for name in sorted(set(files)):
        if (folder / name).is_file():
            size, blocks = _content(folder / name, sort=name not in keep_order)
            digest.update(f"file:{name}:{size}:".encode())
            for block in blocks:
                digest.update(block)
    return Fingerprint(digest.digest(), lambda: _former(folder, facts))


def fingerprint_file(path: Path) -> bytes:
    """Returns 16 bytes: BLAKE2b-128 over the content of a file, without the digest that genssl writes into it."""
    digest = hashlib.blake2b(digest_size=16)
    for block in _content(path)[1]:
        digest.update(block)
    return digest.digest()


def network_files(folder: Path, part: str = "") -> list[str]:
    """Returns the config and the weights that diffusers or transformers load of a network in a sub-folder.

    Weights in other formats (`*.bin`) are not loaded, and those of a variant only where there are no others.
    """
    where = f"{part}/" if part else ""
    weights, _ = find_weights(folder / where)
    if weights is None:
        return [f"{where}config.json"]
    path = folder / where / weights
    shards = set(json.loads(path.read_text())["weight_map"].values()) if path.suffix == ".json" else set()
    return [f"{where}config.json", f"{where}{weights}", *(f"{where}{shard}" for shard in shards)]


def find_weights(folder: Path) -> tuple[str | None, str | None]:
    """Returns the file of a network's weights, or of their index, and the variant that it is of; None if there is none.

    A variant is a copy in half precision that diffusers calls by its name, `variant="fp16"`.
    """
    for variant in (None, *VARIANTS):
        dot = f".{variant}" if variant else ""
        # diffusers looks for the index of several files first, transformers for the one file.
        for weights in (
            f"diffusion_pytorch_model.safetensors.index{dot}.json", f"diffusion_pytorch_model{dot}.safetensors",
            f"model{dot}.safetensors", f"model.safetensors.index{dot}.json",
        ):  # fmt: skip
            if (folder / weights).is_file():
                return weights, variant
    return None, None


def tokenizer_files(part: str) -> list[str]:
    """Returns what a tokenizer in a sub-folder may consist of."""
    return [f"{part}/{name}" for name in TOKENIZER]


def fingerprint_folder(folder: Path, *facts: str) -> bytes:
    """Returns the name by the former rule: over the content of every file but cards, pictures and hidden files."""
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
        for block in _blocks(path):
            digest.update(block)
    return digest.digest()


def _former(folder: Path, facts: tuple[Fact, ...]) -> bytes:
    return fingerprint_folder(
        folder, *(fact if isinstance(fact, str) else f"{fact[0]}{fact[1].former().hex()}" for fact in facts)
    )


def _content(path: Path, *, sort: bool = True) -> tuple[int, Iterator[bytes]]:
    """Returns what of a file counts: its bytes, or a config's values as the libraries write them; with the length."""
    if path.suffix == ".json" and path.name not in DATA:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            text = json.dumps(values, indent=2, sort_keys=sort, ensure_ascii=path.name not in WIDE) + "\n"
            return len(text.encode()), iter([text.encode()])
        except (ValueError, RecursionError):
            pass  # who loads it says so
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        if DIGEST in header.get("__metadata__", {}):
            del header["__metadata__"][DIGEST]
            if not header["__metadata__"]:
                del header["__metadata__"]
            start = header_bytes(header)
            return len(start) + path.stat().st_size - 8 - length, _blocks(path, start, 8 + length)
    return path.stat().st_size, _blocks(path)


def _blocks(path: Path, start: bytes = b"", offset: int = 0) -> Iterator[bytes]:
    yield start
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            yield block
