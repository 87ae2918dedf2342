"""`GenerativeViews` and servers say when a generator is not for the images they meet: once, whoever asks how often."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from server_fixtures import running_server
from torchvision import datasets
from torchvision import transforms as T

from genssl import GenerativeViews

TRAINED = "builtin:digits-unclip was trained on the data set digits alone"
AUGMENT = T.Compose([T.RandomResizedCrop(16), T.ToTensor()])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("server")) as running:
        running.wait_until_serving()
        yield running


def variants_of(size: int):
    return lambda images, indices: np.zeros((len(images), 3, size, size), np.uint8)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_digits_are_what_the_built_in_generator_is_for(server, digits_train, caplog):
    digits = [Image.fromarray(digits_train.image(row)[0]) for row in range(4)]
    views = GenerativeViews(digits, server.address)
    views.__getitems__([0, 1, 2, 3])
    views.close()
    assert warnings_of(caplog) == []
    assert TRAINED not in server.log_path.read_text()


def test_a_folder_of_photos_beside_the_digits_server_is_warned_of_once_by_both(server, photos, caplog):
    views = GenerativeViews(datasets.ImageFolder(photos), server.address, transform=AUGMENT)
    for rows in ([0, 1], [2, 3]):
        views.__getitems__(rows)
    views.close()
    (said,) = warnings_of(caplog)
    assert TRAINED in said
    assert "the data set has images of 24 x 20 pixels, and its own have 8 x 8; make one of your own" in said
    assert server.log_path.read_text().count(TRAINED) == 1


@pytest.mark.slow
def test_all_the_workers_of_a_loader_warn_once(server, photos):
    code = f"""
from torch.utils.data import DataLoader
from torchvision import datasets, transforms as T
from genssl import GenerativeViews
if __name__ == "__main__":
    augment = T.Compose([T.RandomResizedCrop(16), T.ToTensor()])
    views = GenerativeViews(datasets.ImageFolder({str(photos)!r}), {server.address!r}, transform=augment)
    print(sum(len(batch[2]) for batch in DataLoader(views, 4, num_workers=2, multiprocessing_context="forkserver")))
"""
    script = server.log_path.with_name("loop.py")
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "24\n"), done.stderr
    assert done.stderr.count(TRAINED) == 1


@pytest.mark.parametrize(("size", "words"), [(15, "the variants have 15 pixels a side and the views 16"), (16, None)])
def test_variants_smaller_than_the_views_are_warned_of(photos, caplog, size, words):
    views = GenerativeViews(datasets.ImageFolder(photos), variants_of(size), transform=AUGMENT)
    for _ in range(2):
        views.__getitems__([0, 1])
    found = warnings_of(caplog)
    assert len(found) == (0 if words is None else 1)
    assert words is None or words in found[0]


@pytest.mark.parametrize("transform", [None, lambda image: np.asarray(image), lambda image: image])
def test_views_of_any_type_are_measured_by_their_short_side(photos, caplog, transform):
    views = GenerativeViews(datasets.ImageFolder(photos), variants_of(19), transform=transform)
    views.__getitems__([0, 1])
    (said,) = warnings_of(caplog)
    assert "the variants have 19 pixels a side and the views 20" in said


def test_transforms_that_make_something_else_are_not_measured(photos, caplog):
    views = GenerativeViews(datasets.ImageFolder(photos), variants_of(8), transform=lambda image: {"pixels": image})
    views.__getitems__([0, 1])
    assert warnings_of(caplog) == []
