"""A client process of the tests: asks for variants in requests of one size and writes what came to a file.

python variants_client.py ADDRESS OUT ROWS_PER_REQUEST FIRST_INDEX REQUESTS
"""

from __future__ import annotations

import sys

import numpy as np
from sklearn.datasets import load_digits

import genssl


def main() -> None:
    address, out, rows, first, requests = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    pixels = (load_digits().images[:64] * 15).astype(np.uint8)
    images = [np.repeat(digit[None], 3, axis=0) for digit in pixels]
    asked, got = [], []
    with genssl.VariantClient(address, client_id=f"client-{first}", deadline_seconds=120) as client:
        for number in range(requests):
            sources = [(first + number * rows + slot) % len(images) for slot in range(rows)]
            indices = [first + number for _ in sources]
            batch = client.variants([images[source] for source in sources], indices)
            asked += [(source, index) for source, index in zip(sources, indices, strict=True)]
            got.append(batch.images)
            print(number, batch.retries, flush=True)
    assert "torch" not in sys.modules, "a client needs no torch"
    np.savez(out, asked=np.array(asked), images=np.concatenate(got))


if __name__ == "__main__":
    main()
