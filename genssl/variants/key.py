"""What names a variant, and the seed that follows from the name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

# Parameters that came later, at the values that change nothing: left out there, so that variants keep their names.
NEUTRAL = {"guidance_start": 0.0, "guidance_end": 1.0}
PERSON = b"genssl/variant"  # BLAKE2b's personalisation of the hash of a key: source id, fingerprint, parameters, index


def parameters_digest(parameters: Mapping[str, float]) -> bytes:
    """Returns 16 bytes for a complete parameter mapping: equal numbers, equal bytes, in whatever order and type."""
    told = {key: float(value) + 0.0 for key, value in parameters.items() if NEUTRAL.get(key) != value}
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class VariantKey:
    """The four things that a variant is a function of.

    Attributes:
        source_id: 16 bytes, see `StoredImage.source_id`.
        fingerprint: 16 bytes, see `GeneratorSpec.fingerprint`.
        parameters: 16 bytes, see `parameters_digest`.
        index: 0 <= index < 2**64; numbers the variants of a source.
    """

    source_id: bytes
    fingerprint: bytes
    parameters: bytes
    index: int

    def digest(self) -> bytes:
        """Returns 16 bytes that name the variant, in stores and caches."""
        return self._hash(16)

    def digest_with_seed(self, seed: int) -> bytes:
        """Returns 16 bytes that name the image that another seed (0 <= seed < 2**64) makes in this variant's place."""
        return hashlib.blake2b(
            self.digest() + seed.to_bytes(8, "little"), digest_size=16, person=b"genssl/own-seed"
        ).digest()

    def seed(self) -> int:
        """Returns the seed of the variant's noise, 0 <= seed < 2**63, which every language's signed integer holds.

        torch's CPU generator takes the low 32 bits of a seed: two variants draw equal noise by a chance of 2**-32.
        """
        return int.from_bytes(self._hash(8), "little") >> 1

    def _hash(self, size: int) -> bytes:
        digest = hashlib.blake2b(digest_size=size, person=PERSON)
        for part in (self.source_id, self.fingerprint, self.parameters):
            assert len(part) == 16, "every part of a variant's key has 16 bytes"
            digest.update(part)
        digest.update(self.index.to_bytes(8, "little"))
        return digest.digest()
