"""Finished variants in memory, in front of a store."""

from __future__ import annotations

from collections import OrderedDict

from genssl.data.base import UInt8Array

Digest = bytes  # the class has a property of the name `bytes`
# What an image takes beside its pixels: array object, 16 bytes of digest in theirs, dictionary entry, links of the
# order. Measured by tracemalloc (numpy 2, Python 3.11): 268 to 296 bytes, as full as the dictionary's table is.
ENTRY_BYTES = 280


class MemoryCache:
    """Images by digest, least recently used dropped first. Belongs to one thread.

    Args:
        max_bytes: memory taken at once, by pixels and by what holds them; 0 holds nothing.

    Attributes:
        hits, misses: calls of `get` that found the image, and that did not.
    """

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = 0
        self._max_bytes, self._bytes = max_bytes, 0
        self._images: OrderedDict[Digest, UInt8Array] = OrderedDict()

    def get(self, digest: Digest) -> UInt8Array | None:
        """Returns the image uint8 [C, h, w] as it was put, which must not be changed, or None."""
        image = self._images.get(digest)
        if image is None:
            self.misses += 1
            return None
        self.hits += 1
        self._images.move_to_end(digest)
        return image

    def put(self, digest: Digest, image: UInt8Array) -> None:
        """Keeps an image uint8 [C, h, w] without changing it later; one larger than the whole cache is not kept."""
        taken = image.nbytes + ENTRY_BYTES
        if taken > self._max_bytes:
            return
        if image.base is not None:
            # A row of a batch would hold the whole batch in memory, uncounted.
            image = image.copy()
        held = self._images.pop(digest, None)
        self._bytes += taken - (0 if held is None else held.nbytes + ENTRY_BYTES)
        self._images[digest] = image
        while self._bytes > self._max_bytes:
            self._bytes -= self._images.popitem(last=False)[1].nbytes + ENTRY_BYTES

    def __len__(self) -> int:
        return len(self._images)

    @property
    def bytes(self) -> int:
        """Memory taken now."""
        return self._bytes
