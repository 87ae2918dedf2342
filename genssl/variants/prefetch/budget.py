"""A generator budget: which planned variants are asked for, when there may be fewer of them than views."""

from __future__ import annotations

import numpy as np

from genssl.variants.source import VariantRequest


class Budget:
    """Spreads a number of variants of each image over its uses in a run; what is not asked for is reused or real.

    The first use of an image is always asked for, so that there is something to reuse. The others follow evenly, with a
    phase that the image's digest gives, so that every step asks for about as many. Which those are depends on the plan
    alone, unless the generator is too slow even for them: what was dropped unsent is due again at the image's next use.

    Args:
        per_image: variants of each image that may be asked for, at least 1.
        uses: how often the plan wants a variant of an image, on average.
        images: rows of the data set.
    """

    def __init__(self, per_image: int, uses: float, images: int) -> None:
        assert per_image >= 1, "an image has at least one variant"
        self._rate = (per_image - 1) / (uses - 1) if uses > 1 else 1.0
        self._per_image = per_image
        self._used = np.zeros(images, np.int64)
        self._asked = np.zeros(images, np.int64)

    def allows(self, request: VariantRequest) -> bool:
        """Says whether this use, which comes after all that were asked about before, is asked for; and counts it."""
        row, phase = request.row, int.from_bytes(request.source_id[:4], "little") / 2**32
        due = 1 + int(self._used[row] * self._rate + phase) if self._used[row] else 1
        self._used[row] += 1
        if self._asked[row] >= min(due, self._per_image):
            return False
        self._asked[row] += 1
        return True

    def give_back(self, request: VariantRequest) -> None:
        """Takes back an allowance whose variant was never asked for, so that another use of the image has it."""
        self._asked[request.row] -= 1
