"""A folder of one's own images, as folders are: it trains a flow, which is measured and served."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from genssl import VariantClient

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/generators/folder_flow.yaml"
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

    block = f"dataset={{name: folder, root: '{photos}', labels: none, image_size: {SIZE}, on_corrupt: skip}}"
    settings = (f"generator.model={model}", block, "evaluate=[]")
    done = genssl(
        "evaluate-generator", "recipes/simclr_flow.yaml", *settings, "--vary=embedding_noise=0.3", "--out", str(card)
    )
    assert done.returncode == 0, done.stderr
    rows = {row["setting"]: row for row in json.loads((card / "quality.json").read_text())["rows"]}
    assert rows["the recipe's"]["label_agreement"] is None  # there are no labels
    assert set(rows) == {"real images", "standard augmentations", "the recipe's"}

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
