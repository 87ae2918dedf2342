"""Generative views for other people's trainers, through torch's own DataLoader and a real server."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from genssl import GenerativeViews, VariantClient
from genssl.client.messages import VariantBatch
from genssl.errors import ServerUnavailableError, UserError
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.plan import ViewPlan
from genssl.variants.source import REAL, VariantRequest
from genssl.views.counts import SharedCounts

ROOT = Path(__file__).resolve().parents[2]
COUNT = 40


class Pictures(Dataset):
    """The first train digits as PIL images with their labels: an ordinary data set of somebody else's."""

    def __init__(self, digits) -> None:
        self.pixels = [digits.image(row) for row in range(COUNT)]
        self.labels = [digits.label(row) for row in range(COUNT)]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, row: int):
        return Image.fromarray(self.pixels[row][0]), self.labels[row]


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    address_file = folder / "address"
    command = [sys.executable, "-m", "genssl", "serve-generator", "servers/digits_unclip.yaml"]
    command += ["address=127.0.0.1:0", "threads=1", "--address-file", str(address_file)]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT)
    while not address_file.exists():
        assert process.poll() is None, (folder / "server.log").read_text()
        time.sleep(0.02)
    return process, address_file.read_text().strip()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    process, where = start_server(tmp_path_factory.mktemp("server"))
    yield where
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def pictures(digits_train):
    return Pictures(digits_train)


class Counted:
    """A source that is a function: grey images of the index, and a count of its calls."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, images, indices):
        self.calls.append(list(indices))
        return np.stack([np.full((3, 8, 8), index % 251, np.uint8) for index in indices])


def plan_of(epoch: int, rows: list[int], **settings) -> np.ndarray:
    """The indices that a run of `genssl run` draws for these rows in this epoch."""
    plan = ViewPlan(num_sources=COUNT, batch_size=COUNT, **settings)
    step = plan.step(epoch, 0)
    return step.indices[np.argsort(step.rows)][rows]


def test_items_are_the_image_its_variant_and_the_label(address, digits_train, pictures, unclip):
    views = GenerativeViews(pictures, address, seed=3)
    views.set_epoch(2)
    rows = [4, 0, 17]
    items = views.__getitems__(rows)
    indices = plan_of(2, rows, seed=3, policy="second", probability=1.0, per_image="fresh")[:, 1]
    source = InProcessSource(VariantEngine(unclip, [1, 4, 16, 64]), digits_train, Ledger())
    wanted = [
        VariantRequest(row, digits_train.source_id(row), int(index)) for row, index in zip(rows, indices, strict=True)
    ]
    made = source.take(wanted).images
    for (view1, view2, label), row, variant in zip(items, rows, made, strict=True):
        assert view1.dtype == torch.float32
        assert np.array_equal((view1 * 255).round().byte().numpy(), pictures.pixels[row])
        assert np.abs((view2 * 255).round().numpy() - variant).max() <= 1
        assert label == pictures.labels[row]
    views.close()


@pytest.mark.parametrize("policy", ["second", "both", "third", "added", "none"])
@pytest.mark.parametrize("per_image", ["fresh", 3])
def test_indices_are_those_of_the_view_plan(pictures, policy, per_image):
    settings = {"seed": 5, "policy": policy, "probability": 0.5, "per_image": per_image, "third_count": 3}
    rows = [7, 1, 30, 22, 8]
    for epoch in (0, 3):
        source = Counted()
        views = GenerativeViews(pictures, source, **settings)
        views.set_epoch(epoch)
        views.__getitems__(rows)
        planned = [int(index) for index in plan_of(epoch, rows, **settings).ravel() if index != REAL]
        assert [index for call in source.calls for index in call] == planned


def test_third_adds_views_and_added_shows_one_variant_twice(pictures):
    views = GenerativeViews(pictures, Counted(), policy="third", third_count=2, per_image=100)
    *pair, third, fourth, label = views[5]
    assert all(np.array_equal((view * 255).round().byte().numpy(), pictures.pixels[5]) for view in pair)
    shown = [int((view * 255).round()[0, 0, 0]) for view in (third, fourth)]
    assert (
        shown == plan_of(0, [5], seed=0, policy="third", third_count=2, probability=1.0, per_image=100)[0, 2:].tolist()
    )
    assert label == pictures.labels[5]
    source = Counted()
    first, second, _ = GenerativeViews(pictures, source, policy="added", per_image=100)[5]
    assert torch.equal(first, second)
    assert source.calls == [[int((first * 255).round()[0, 0, 0])]]


def test_a_batch_is_one_call_and_one_item_is_the_same_alone(pictures):
    source = Counted()
    views = GenerativeViews(pictures, source, policy="both", per_image=100)
    (view1, view2, labels), *others = list(DataLoader(views, batch_size=10))
    assert len(source.calls) == 4
    assert len(others) == 3
    assert view1.shape == view2.shape == (10, 3, 8, 8)
    assert labels.tolist() == pictures.labels[:10]
    alone = views[9]
    assert torch.equal(alone[0], view1[9])
    assert torch.equal(alone[1], view2[9])
    assert torch.equal(views[-31][1], alone[1]), "rows count from the end too"
    with pytest.raises(IndexError):
        views[COUNT]


def test_the_transform_gets_every_view_as_a_picture(pictures):
    views = GenerativeViews(pictures, Counted(), transform=lambda image: (image.mode, image.size))
    assert views[0] == (("RGB", (8, 8)), ("RGB", (8, 8)), pictures.labels[0])


def test_images_without_labels_and_as_arrays(pictures):
    arrays = [pixels.copy() for pixels in pictures.pixels]
    view1, view2 = GenerativeViews(arrays, Counted())[0]
    assert np.array_equal((view1 * 255).round().byte().numpy(), arrays[0])
    assert view2.shape == (3, 8, 8)
    tensors = [torch.from_numpy(pixels[0]) for pixels in arrays]
    assert torch.equal(GenerativeViews(tensors, Counted())[0][0], view1)


def test_workers_get_the_epoch_and_ask_the_server_themselves(address, pictures):
    rows = list(range(COUNT))
    alone = GenerativeViews(pictures, address, seed=1)
    views = GenerativeViews(pictures, address, seed=1)
    views[0]  # the client is live here when the workers start
    loader = DataLoader(
        views, batch_size=10, num_workers=2, persistent_workers=True, multiprocessing_context="forkserver", timeout=60
    )
    seen = []
    for epoch in range(2):
        views.set_epoch(epoch)
        alone.set_epoch(epoch)
        loaded = torch.cat([view2 for _, view2, _ in loader])
        expected = torch.stack([view2 for _, view2, _ in alone.__getitems__(rows)])
        assert (loaded - expected).abs().max() <= 1.01 / 255
        seen.append(loaded)
    assert not torch.equal(*seen), "persistent workers hear of the new epoch"
    views.close()
    alone.close()


def test_a_worker_forked_from_a_live_client_is_refused_with_what_to_do(address, pictures):
    views = GenerativeViews(pictures, address)
    views[0]
    loader = DataLoader(views, batch_size=10, num_workers=1, multiprocessing_context="fork", timeout=60)
    with pytest.raises(UserError, match="multiprocessing_context='forkserver'"):
        next(iter(loader))
    views.close()


class ProcessOnly(VariantClient):
    """A client that makes its variants itself, without a server, and says that it had to repeat calls."""

    def variants(self, images, indices=0, **settings):
        count = len(images.positions)
        if images.requests[0].row % 2 == 0 and images.names[0].startswith("row 0 "):
            error = ServerUnavailableError("late")
            error.retries = 7
            raise error
        return VariantBatch(np.zeros((count, 3, 8, 8), np.uint8), ["store"] * count, images.source_ids, 0.1, 2)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_origins_and_retries_are_counted_over_all_workers(pictures, method):
    views = GenerativeViews(pictures, ProcessOnly("localhost:1", allow_fork=True), policy="both", late="real")
    for _ in range(2):  # the workers of the first epoch have ended by the second
        for _ in DataLoader(views, batch_size=4, num_workers=2, multiprocessing_context=method, timeout=60):
            pass
    views.__getitems__([1, 2])
    assert views.origins == {"generated": 0, "store": 2 * 2 * 36 + 4, "real": 2 * 2 * 4}
    assert views.retries == 2 * (9 * 2 + 7) + 2
    assert views.ledger.origins == {"store": 4}, "of this process alone"


def _add_many(counts: SharedCounts) -> None:
    for _ in range(2000):
        counts.add({"real": 1, "store": 2})


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_no_count_is_lost_when_processes_add_at_once(method):
    counts = SharedCounts(["generated", "store", "real"])
    children = [multiprocessing.get_context(method).Process(target=_add_many, args=(counts,)) for _ in range(3)]
    for child in children:
        child.start()
    _add_many(counts)
    for child in children:
        child.join(60)
    assert [counts["generated"], counts["store"], counts["real"]] == [0, 16000, 8000]


def test_an_addition_waits_for_another_one():
    counts = SharedCounts(["real"])
    child = multiprocessing.get_context("fork").Process(target=counts.add, args=({"real": 1},))
    with counts._lock:
        child.start()
        child.join(1)
        assert counts["real"] == 0
    child.join(60)
    assert counts["real"] == 1


def test_views_can_be_pickled_outside_of_a_start_of_children(pictures):
    views = GenerativeViews(list(pictures), "localhost:1", policy="none")
    copy = pickle.loads(pickle.dumps(views))
    assert torch.equal(copy[3][0], views[3][0])


def test_forked_workers_may_use_a_client_that_allows_it_or_need_none(address, pictures):
    """In a process of its own: gRPC may crash in what is forked from this one, which has live clients."""
    code = f"""
import sys
from torch.utils.data import DataLoader
from PIL import Image
from genssl import GenerativeViews, VariantClient
from genssl.variants.prefetch import loop as background
images = [Image.new("L", (8, 8), row) for row in range(4)]
background.background_loop()  # live, but without a channel that gRPC might trip over
settings = dict(num_workers=1, multiprocessing_context="fork", timeout=60)
allowed = GenerativeViews(images, VariantClient({address!r}, allow_fork=True))
without = GenerativeViews(images, {address!r}, policy="none")
for views in (allowed, without):
    print(next(iter(DataLoader(views, 4, **settings)))[1].shape[0], sum(views.origins.values()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["4", "4", "4", "0"], done.stderr


def test_a_deadline_of_nothing_is_told(pictures):
    with pytest.raises(ValueError, match="deadline_seconds is 0; it must be above 0"):
        GenerativeViews(pictures, "localhost:1", deadline_seconds=0)


def test_an_image_that_is_wrong_is_named_by_its_row_in_the_data_set(pictures):
    arrays = [pixels.copy() for pixels in pictures.pixels]
    arrays[17] = arrays[17].astype(np.float32)
    with pytest.raises(TypeError, match="row 17 of the data set has the dtype float32"):
        GenerativeViews(arrays, "localhost:1").__getitems__([4, 17])


def test_late_variants_are_replaced_and_counted_or_end_the_training(address, tmp_path, pictures):
    nobody = f"unix:{tmp_path}/nobody.sock"
    strict = GenerativeViews(pictures, VariantClient(nobody, deadline_seconds=30), deadline_seconds=0.5)
    with pytest.raises(ServerUnavailableError, match="gives no answer"):
        strict[0]
    tolerant = GenerativeViews(pictures, nobody, late="real", deadline_seconds=0.5)
    for view1, view2, _ in tolerant.__getitems__([1, 2, 3]):
        assert torch.equal(view1, view2)
    assert tolerant.ledger.origins == {"real": 3}
    assert tolerant.ledger.stall_seconds >= 0.5
    assert tolerant.origins == {"generated": 0, "store": 0, "real": 3}
    in_time = GenerativeViews(pictures, address, late="real", seed=77)
    in_time.__getitems__([1, 2, 3])
    assert in_time.ledger.origins == {"generated": 3}
    for views in (strict, tolerant, in_time):
        views.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "first"}, "policy is 'first'; allowed: second, both, third, added, none"),
        ({"late": "never"}, "late is 'never'; allowed: block, real"),
        ({"probability": 2}, "probability is 2; allowed: 0 to 1"),
        ({"third_count": 0}, "third_count is 0; allowed: 1 and more"),
        ({"per_image": 0}, "per_image is 0; allowed: fresh, or 1 and more"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_settings_are_told(pictures, settings, words):
    with pytest.raises(ValueError, match=words):
        GenerativeViews(pictures, Counted(), **settings)


def test_settings_of_a_server_given_with_a_function_are_told(pictures):
    with pytest.raises(UserError, match="source is a function"):
        GenerativeViews(pictures, Counted(), parameters={"noise_level": 1})


def test_images_and_variants_of_another_type_are_told(pictures):
    floats = [pixels.astype(np.float32) for pixels in pictures.pixels]
    with pytest.raises(TypeError, match="take the transforms off the data set"):
        GenerativeViews(floats, Counted())[0]
    with pytest.raises(ValueError, match=r"the source returned float64 \[1, 3, 8, 8\] for 1 images"):
        GenerativeViews(pictures, lambda images, indices: np.zeros((len(images), 3, 8, 8)))[0]
