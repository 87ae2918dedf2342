"""What a step does when its variants are late (`variants.late`), and what is asked for so that fewer are.

block waits for every variant. real shows the image itself in place of a variant that is not there. reuse shows another
variant of the image, out of the pool of those received before, and the image itself where the pool has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.source import REAL, Image, Slot, VariantRequest


class VariantLimit:
    """Spreads a number of variants of each image over its uses in a run; what is not asked for is reused or real.

    The first use of an image is always asked for, so that there is something to reuse. The others follow evenly, with a
    phase that the image's digest gives, so that every step asks for about as many. Which those are depends on the plan
    alone, unless the generator is too slow even for them: what was dropped unsent is due again at the image's next use.

    Args:
        max_variants_per_image: that may be asked for, at least 1.
        uses: how often the plan wants a variant of an image, on average.
        images: rows of the data set.
    """

    def __init__(self, max_variants_per_image: int, uses: float, images: int) -> None:
        assert max_variants_per_image >= 1, "an image has at least one variant"
        self._rate = (max_variants_per_image - 1) / (uses - 1) if uses > 1 else 1.0
        self._most = max_variants_per_image
        self._used = np.zeros(images, np.int64)
        self._asked = np.zeros(images, np.int64)

    def allows(self, request: VariantRequest) -> bool:
        """Says whether this use, which comes after all that were asked about before, is asked for; and counts it."""
        row, phase = request.row, int.from_bytes(request.source_id[:4], "little") / 2**32
        due = 1 + int(self._used[row] * self._rate + phase) if self._used[row] else 1
        self._used[row] += 1
        if self._asked[row] >= min(due, self._most):
            return False
        self._asked[row] += 1
        return True

    def give_back(self, request: VariantRequest) -> None:
        """Takes back an allowance whose variant was never asked for, so that another use of the image has it."""
        self._asked[request.row] -= 1


class Lateness:
    """The rule of a run for late variants.

    Args:
        late: the rule's name.
        pool: received variants, for `reuse`.
        limit: which of the planned variants are asked for; None: all that the pool lacks.

    Attributes:
        waits: whether a step waits for all its variants.
    """

    def __init__(
        self,
        late: Literal["block", "reuse", "real"],
        pool: VariantPool | None = None,
        limit: VariantLimit | None = None,
    ) -> None:
        self.waits = late == "block"
        self.pool, self._limit = pool, limit
        self._relied: dict[tuple[bytes, int], tuple[int, VariantRequest]] = {}  # left to the pool, the last step's

    def to_ask(self, requests: Sequence[VariantRequest], step: int) -> list[VariantRequest]:
        """Returns those of an announced step that are asked for.

        What the pool holds is not; it becomes the pool's newest, to be there when the step comes.
        """
        wanted = list(requests)
        if self.pool is not None:
            held = self.pool.keep([request.key for request in requests])
            self._relied |= {
                request.key: (step, request) for request, is_held in zip(requests, held, strict=True) if is_held
            }
            wanted = [request for request, is_held in zip(requests, held, strict=True) if not is_held]
        return wanted if self._limit is None else [request for request in wanted if self._limit.allows(request)]

    def lost(self, now: int) -> Iterable[tuple[int, VariantRequest]]:
        """Yields what later steps than `now` left to the pool and the pool, too small for all of them, has dropped."""
        for key in self.pool.lost() if self.pool is not None else []:
            step, request = self._relied.pop(key, (now, None))
            if request is not None and step > now:
                yield step, request

    def never_asked(self, requests: Iterable[VariantRequest]) -> None:
        """Notes what was announced and dropped unsent."""
        if self._limit is not None:
            for request in requests:
                self._limit.give_back(request)

    def fill(self, requests: Sequence[VariantRequest], images: Sequence[Image | None], step: int) -> list[Slot]:
        """Returns what every request of a step gets that does not wait: what came, a stand-in, or the image itself."""
        slots = [self._slot(request, image, step) for request, image in zip(requests, images, strict=True)]
        for request in requests:
            if request.key in self._relied and self._relied[request.key][0] <= step:
                del self._relied[request.key]
        return slots

    def lacks(self, request: VariantRequest) -> bool:
        """Says whether the pool does not hold a variant."""
        return self.pool is None or not self.pool.holds(*request.key)

    def _slot(self, request: VariantRequest, image: Image | None, step: int) -> Slot:
        if image is not None:
            if self.pool is not None:
                self.pool.used_fresh(*request.key)
            return request.index, *image
        chosen = self.pool.choose(*request.key, step) if self.pool is not None else None
        if chosen is None:
            return REAL, None, "real"
        index, pixels = chosen
        return index, pixels, "store" if index == request.index else "reused"
