"""Decoding processes read what the data set reads, tell of corrupt files, and end with whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genssl.config.views import CropsConfig, ViewsConfig
from genssl.data.configs import FolderConfig
from genssl.data.folder import ImageFolder
from genssl.data.workers import DecodingWorkers
from genssl.errors import DataError, UserError
from genssl.training.loader import ROWS_PER_TASK, SourceLoader
from genssl.variants.plan import ViewPlan
from genssl.views.augmentations import Augmentations

COUNT = 41


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageFolder:
    root = tmp_path_factory.mktemp("pictures")
    draws = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = draws.integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02}.png")
    return ImageFolder(FolderConfig(root=root, image_size=16, labels="none", test_fraction=0.01), "train")


@pytest.fixture
def workers(folder):
    made = DecodingWorkers(folder, 2)
    yield made
    made.close()


def pids(workers: DecodingWorkers) -> list[int]:
    return list(workers._pool._processes)


def test_batches_are_those_of_threads_and_a_corrupt_file_is_named(folder, tmp_path):
    plan = ViewPlan(seed=0, num_sources=len(folder), batch_size=20, policy="none", probability=0.0, per_image="fresh")
    assert ROWS_PER_TASK < 20 < 2 * ROWS_PER_TASK
    steps = [plan.step(epoch, step) for epoch in range(2) for step in range(2)]
    augmentations = Augmentations(ViewsConfig(crops=CropsConfig(count=1, size=8)), folder.image_size)
    crops = partial(augmentations.crop_draws, seed=0)
    loaders = [SourceLoader(folder, crops, threads=2, ahead=2, workers=workers) for workers in (0, 2)]
    by_threads, by_processes = (list(loader.batches(iter(steps))) for loader in loaders)
    for (plan_one, one), (plan_other, other) in zip(by_threads, by_processes, strict=True):
        assert plan_one is plan_other
        assert [images.shape[1:] for images in one.images] == [(3, 16, 16), (3, 16, 16), (3, 8, 8)]
        for images, same in zip(one.images, other.images, strict=True):
            assert images.dtype == torch.uint8
            assert torch.equal(images, same)
    path = Path(folder._paths[int(steps[0].rows[17])])
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:50])
        with pytest.raises(DataError, match=path.name):
            list(loaders[1].batches(iter(steps[:1])))
    finally:
        path.write_bytes(whole)
    for loader in loaders:
        loader.close()


def test_a_worker_that_dies_is_told(workers):
    workers.result(workers.read([0]))
    os.kill(pids(workers)[0], signal.SIGTERM)  # for the training alone
    assert workers.result(workers.read([0, 1]))[0].shape == (2, 3, 16, 16)
    os.kill(pids(workers)[0], signal.SIGKILL)
    for _ in range(200):
        if not workers._pool._processes or workers._pool._broken:
            break
        time.sleep(0.05)
    with pytest.raises(UserError, match=r"lower train\.workers"):
        workers.result(workers.read([0]))


def test_a_data_set_that_cannot_be_copied_is_told(folder):
    class Bound:
        name = "bound"

        def __init__(self) -> None:
            self.image = lambda row: folder.image(row)

    with pytest.raises(UserError, match=r"data set bound cannot be copied to other processes .* set train.workers: 0"):
        DecodingWorkers(Bound(), 1)  # type: ignore[arg-type]


KILLED = """
import os, signal, sys
from pathlib import Path
from genssl.data.configs import FolderConfig
from genssl.data.folder import ImageFolder
from genssl.data.workers import DecodingWorkers
if __name__ == "__main__":
    config = FolderConfig(root=sys.argv[1], image_size=16, labels="none", test_fraction=0.01)
    workers = DecodingWorkers(ImageFolder(config, "train"), 2)
    for reading in [workers.read(range(16)) for _ in range(8)]:
        workers.result(reading)
    print(*workers._pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(folder, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    root = Path(folder._paths[0]).parent
    found = subprocess.run([sys.executable, script, root], capture_output=True, text=True, timeout=60)
    assert found.returncode == -signal.SIGKILL, found.stderr
    left = [int(pid) for pid in found.stdout.split()]
    assert left
    deadline = time.monotonic() + 20
    while left and time.monotonic() < deadline:
        left = [pid for pid in left if _alive(pid)]
        time.sleep(0.05)
    assert left == []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
