"""Eight client processes at once, over a restart of the server, get what in-process generation makes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from genssl.data.base import raw_image
from genssl.variants.engine import VariantEngine

CLIENT = Path(__file__).parents[1] / "helpers" / "variants_client.py"
SIZES = (1, 2, 3, 5, 8, 13, 21, 40)
REQUESTS = 8


def expected_variants(engine: VariantEngine, asked: np.ndarray) -> np.ndarray:
    """Makes the same variants in process, one batch after another."""
    pixels = (load_digits().images[:64] * 15).astype(np.uint8)
    images = [np.repeat(digit[None], 3, axis=0) for digit in pixels]
    embeddings, _ = engine.embed([engine.generator.preprocess(image) for image in images])
    ids = [raw_image(image).source_id for image in images]
    settings = engine.complete({})
    rows = [engine.row(ids[source], embeddings[source], int(index), settings) for source, index in asked]
    most = engine.buckets[-1]
    return np.concatenate([engine.generate(rows[start : start + most])[0] for start in range(0, len(rows), most)])


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["dynamic", "deterministic"])
def test_eight_clients_over_a_restart_get_the_variants_of_in_process_generation(
    start_server, unclip, tmp_path, batching
):
    settings = [f"batching={batching}", "buckets=[1, 4, 16]"]
    address = f"unix:{tmp_path}/server.sock"
    with start_server(tmp_path, *settings, address=address) as first:
        first.wait_until_serving()
        clients = []
        for number, size in enumerate(SIZES):
            command = [sys.executable, str(CLIENT), address, str(tmp_path / f"{number}.npz"), str(size)]
            command += [str(1000 * number), str(REQUESTS)]
            clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for client in clients:  # every one of them is at work when the server dies
            assert client.stdout.readline().startswith("0 "), client.communicate()[1]
        first.stop(signal.SIGKILL)
    time.sleep(1)
    with start_server(tmp_path, *settings, address=address):
        outputs = [client.communicate(timeout=200) for client in clients]
    assert [client.returncode for client in clients] == [0] * len(clients), [errors for _, errors in outputs]
    retries = sum(int(line.split()[1]) for printed, _ in outputs for line in printed.splitlines())
    assert retries > 0, "the restart was noticed"

    engine = VariantEngine(unclip, [1, 4, 16], deterministic=batching == "deterministic")
    for number, size in enumerate(SIZES):
        with np.load(tmp_path / f"{number}.npz") as came:
            asked, images = came["asked"], came["images"]
        assert len(images) == size * REQUESTS
        difference = np.abs(images.astype(int) - expected_variants(engine, asked))
        assert difference.max() <= (0 if batching == "deterministic" else 1)
