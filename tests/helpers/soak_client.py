"""A paced client: takes a step of new variants every second, as a training under the policy `reuse` does.

    python soak_client.py ADDRESS NUMBER
It ends with its standard input, and then prints how many steps it took and from where its variants came, as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from genssl.client.source import RemoteSource
from genssl.config.recipe import VariantsConfig
from genssl.data.configs import DigitsConfig
from genssl.data.digits import Digits
from genssl.variants.ledger import Ledger
from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.source import VariantRequest

ROWS, PERIOD, AHEAD = 8, 1.0, 2
REPEATED = 40  # every fourth step asks once more for what was asked for so many steps before


def main(address: str, number: int) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    dataset, ledger = Digits(DigitsConfig(), "train"), Ledger()
    config = VariantsConfig(late="reuse", rows_per_request=4, deadline_seconds=60)
    pool = VariantPool(None, max_bytes=2**20, max_reuse=config.max_reuse, max_age_steps=None)
    source = RemoteSource(
        targets=[address],
        generator_id="stable_unclip",
        parameters={},
        dataset=dataset,
        config=config,
        ledger=ledger,
        pool=pool,
    )

    def requests(step: int) -> list[VariantRequest]:
        if step % 4 == 3 and step > REPEATED:
            step -= REPEATED + 1
        rows = [(number * 150 + ROWS * step + row) % len(dataset) for row in range(ROWS)]
        return [VariantRequest(row, dataset.source_id(row), 10_000 * number + step) for row in rows]

    step, origins = 0, dict[str, int]()
    try:
        for step in range(AHEAD):
            source.announce(requests(step), step)
        while not ended.wait(PERIOD):
            source.announce(requests(step + AHEAD), step + AHEAD)
            for origin in source.take(requests(step), step).origins:
                origins[origin] = origins.get(origin, 0) + 1
            step += 1
    finally:
        source.close()
    print(json.dumps({"steps": step, "origins": origins}), flush=True)


if __name__ == "__main__":
    time.sleep(0.1 * int(sys.argv[2]))  # not all in the same moment
    main(sys.argv[1], int(sys.argv[2]))
