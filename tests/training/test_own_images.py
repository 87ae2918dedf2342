"""A folder of one's own images, as folders are: it trains a flow, which is measured and served."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import SHORT, run_and_read
from sklearn.datasets import load_digits, load_sample_images

from genssl import VariantClient
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.encoders.judge import transfer
from genssl.encoders.load import load_encoder
from genssl.errors import DataError

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/generators/folder_flow.yaml"
PHOTOS = "recipes/photos/simclr.yaml"
QUICK = ("conditioner.backbone.width=4", "conditioner.epochs=1", "flow.steps=8", "flow.block_out_channels=[16, 16]")
SIZE = 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """200 crops of two photos and of digits, 9 to 90 pixels a side, grey and colour, PNG and JPEG; one is cut off."""
    root: Path = tmp_path_factory.mktemp("own") / "photos"
    (root / "deeper").mkdir(parents=True)
    draws = np.random.default_rng(0)
    sources, digits = load_sample_images().images, load_digits().images
    for number in range(200):
        height, width = draws.integers(9, 91, 2)
        if number % 4 == 0:
            digit = Image.fromarray((digits[number] / 16 * 255).astype(np.uint8))
            image = digit.resize((int(width), int(height)))
        else:
            photo = sources[number % 2]
            top, left = draws.integers(0, photo.shape[0] - height), draws.integers(0, photo.shape[1] - width)
            image = Image.fromarray(photo[top : top + height, left : left + width])
            if number % 4 == 1:
                image = image.convert("L")
        folder = root / "deeper" if number % 3 == 0 else root
        image.save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    victim = root / "7.png"
    victim.write_bytes(victim.read_bytes()[:-200])
    return root


def genssl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genssl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.slow
def test_a_folder_of_mixed_images_with_a_corrupt_one_trains_a_flow_that_is_measured_and_served(photos, tmp_path):
    model, card = tmp_path / "my-flow", tmp_path / "quality"
    own = (f"dataset.root={photos}", f"dataset.image_size={SIZE}", *QUICK)
    refused = genssl("train-generator", RECIPE, *own, "dataset.on_corrupt=fail", "--out", str(model))
    assert refused.returncode == 2
    assert "7.png: the image is corrupt" in refused.stderr
    assert "dataset.on_corrupt: skip" in refused.stderr
    assert not model.exists()

    done = genssl("train-generator", RECIPE, *own, "--out", str(model))
    assert done.returncode == 0, done.stderr
    assert f"1 corrupt file is left out, such as {photos}/7.png" in done.stdout
    facts = json.loads((model / "card.json").read_text())["dataset"]
    quality = json.loads((model / "quality.json").read_text())
    assert facts["images"] + quality["sources"] == 199

    settings = (f"generator.model={model}", f"dataset.root={photos}", f"dataset.image_size={SIZE}")
    done = genssl("evaluate-generator", PHOTOS, *settings, "--vary=embedding_noise=0.3", "--out", str(card))
    assert done.returncode == 0, done.stderr
    rows = {row["setting"]: row for row in json.loads((card / "quality.json").read_text())["rows"]}
    assert rows["the recipe's"]["label_agreement"] is None  # there are no labels
    assert set(rows) == {"real images", "standard augmentations", "the recipe's"}

    settings += ("train.epochs=3", "schedule.warmup_epochs=0", "backbone.width=8", "variants.per_image=1")
    for source in ("online", "none"):
        done = genssl("run", PHOTOS, *settings, f"variants.source={source}", "--out", str(tmp_path / "runs" / source))
        assert done.returncode == 0, done.stderr
        assert "no sub-folders that could be classes, so no labels" in done.stdout, "one alone is none"
        assert "left out, since they need labels: knn, linear_probe" in done.stdout
    table = genssl("runs", str(tmp_path / "runs")).stdout
    assert "rankme/effective_rank" in table
    assert "paired difference" in table

    address = tmp_path / "address"
    command = [sys.executable, "-m", "genssl", "serve-generator", "servers/digits_unclip.yaml"]
    command += [f"generators=[{{name: flow, model: '{model}'}}]", "address=127.0.0.1:0", "threads=1"]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen([*command, "--address-file", str(address)], stdout=log, stderr=log, cwd=ROOT)
    try:
        while not address.exists():
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.02)
        files = [photos / "1.png", photos / "2.jpg", photos / "deeper" / "0.jpg", photos / "deeper" / "3.png"]
        with VariantClient(address.read_text().strip()) as client:
            images = client.variants([file.read_bytes() for file in files], indices=0).images
            again = client.variants([file.read_bytes() for file in files], indices=0).images
        assert images.shape == (4, 3, SIZE, SIZE)
        assert len({image.tobytes() for image in images}) == 4
        np.testing.assert_array_equal(images, again)
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def dozens(tmp_path) -> Path:
    """Forty small pictures in a flat folder."""
    for number in range(40):
        path = tmp_path / "dozens" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (12, 16, 3), np.uint8)).save(path)
    return tmp_path / "dozens"


def photo_run(root: Path, out: Path, *overrides: str) -> tuple[dict[str, float], str]:
    """Trains by the recipe for own photos, without variants; returns metrics and what was said."""
    quick = [*SHORT, "train.batch_size=8"]
    own = [f"dataset.root={root}", "dataset.image_size=8", "generator=null", "variants.source=none"]
    results, text = run_and_read(load(Recipe, ROOT / PHOTOS, [*quick, *own, *overrides]), out)
    return results["metrics"], text


def test_a_flat_folder_is_judged_without_labels_and_sub_folders_with(dozens, tmp_path):
    flat, said = photo_run(dozens, tmp_path / "flat")
    assert set(flat) == {"rankme/effective_rank", "alignment_uniformity/alignment_real_real"} | {
        "alignment_uniformity/uniformity_real"
    }
    assert "no sub-folders that could be classes, so no labels" in said
    assert "left out, since they need labels: knn, linear_probe" in said
    (encoder,) = [load_encoder(str(tmp_path / "flat"), torch.device("cpu"))]
    rows = transfer([encoder], [([], [])], torch.device("cpu")).rows
    assert {row.evaluator for row in rows} == {"rankme", "alignment_uniformity"}, "as the run's own"

    for path in list(dozens.iterdir()):
        folder = dozens / ("even" if int(path.stem) % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    classes, said = photo_run(dozens, tmp_path / "classes")
    assert {"knn/top1", "linear_probe/top1"} <= set(classes)
    assert "its 2 sub-folders are the classes" in said


def test_who_says_that_there_are_no_labels_is_told_which_evaluators_need_them(dozens, tmp_path):
    with pytest.raises(DataError, match=r"evaluate\.knn: the evaluators need labels and folder has none here"):
        photo_run(dozens, tmp_path / "out", "dataset.labels=none")
    assert not (tmp_path / "out").exists()
