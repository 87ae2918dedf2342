"""Training a generator: from images to a folder that diffusers loads, the same every time, whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from PIL import Image

from genssl.config.generator_recipe import GeneratorRecipe
from genssl.errors import ConfigError, UserError
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.stable_unclip import StableUnCLIP
from genssl.training.generator import train_generator

sys.path.insert(0, str(Path(__file__).parent))
from miniatures import quiet
from miniatures import recipe as parsed

MINIATURE = """
name: miniature
family: stable_unclip
dataset: {name: digits}
image_encoder: {hidden_size: 16, num_layers: 1, num_heads: 2, embedding_dim: 16, epochs: 1}
autoencoder: {block_out_channels: [8, 8], epochs: 3}
denoiser: {block_out_channels: [16, 16], steps: 30}
threads: 1
"""


def recipe(text: str = MINIATURE) -> GeneratorRecipe:
    return parsed(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generators") / "miniature"
    return train_generator(recipe(), folder, quiet()), folder


def test_the_folder_is_a_diffusers_pipeline_that_equals_our_sampler(trained, digits_test):
    _, folder = trained
    generator = StableUnCLIP(
        StableUnCLIPConfig(model=str(folder), num_inference_steps=4, guidance_scale=1.0), torch.device("cpu")
    )
    image = digits_test.image(0)
    ours = generator.generate(generator.embed(torch.from_numpy(image[None])), [7], [generator.spec.defaults])[0].numpy()
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        image=Image.fromarray(image.transpose(1, 2, 0)),
        prompt="",
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.abs(np.asarray(stock).transpose(2, 0, 1).astype(int) - ours).max() <= 1


@pytest.mark.slow
def test_training_again_gives_the_same_weights(trained, tmp_path):
    _, folder = trained
    train_generator(recipe(), tmp_path / "again", quiet())
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes(), path.name


def test_the_card_says_what_it_was_made_of_and_how_good_it_is(trained):
    quality, folder = trained
    card = json.loads((folder / "card.json").read_text())
    assert card["dataset"] == {
        "name": "digits",
        "split": "train",
        "images": 1437,
        "corrupt_left_out": 0,
        "labels_used": False,
    }
    assert card["recipe"]["denoiser"]["steps"] == 30
    assert quality == json.loads((folder / "quality.json").read_text())
    assert [row["noise_level"] for row in quality["settings"]] == [0, 200, 300, 400, 500]
    assert str(quality["settings"][0]["label_agreement"]) in (folder / "README.md").read_text()


@pytest.mark.slow
def test_training_reads_no_labels(tmp_path, monkeypatch):
    """With every label gone the weights are the same, and the card says that nothing was judged."""
    from genssl.data.digits import Digits

    train_generator(recipe(), tmp_path / "with", quiet())
    original = Digits.__init__

    def unlabelled(self, config, split) -> None:
        original(self, config, split)
        self.class_names = None
        self._labels = np.full_like(self._labels, -1)

    monkeypatch.setattr(Digits, "__init__", unlabelled)
    quality = train_generator(recipe(), tmp_path / "without", quiet())
    assert quality["settings"][0]["label_agreement"] is None
    for path in (tmp_path / "with").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "without" / path.relative_to(tmp_path / "with")).read_bytes()


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        train_generator(recipe(), tmp_path, quiet())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden_size: 16", "hidden_size: 16, patch_size: 3", "patch_size: 3 does not divide the image size 8"),
        ("[16, 16]", "[16, 16, 16, 16]", "4 levels do not fit latents of 4 pixels"),
        (
            "epochs: 3",
            "epochs: 3, batch_size: 5000",
            "autoencoder.batch_size: 5000 is more than the 1437 training images",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_training(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        train_generator(recipe(MINIATURE.replace(old, new)), tmp_path / "out", quiet())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_training_publishes_nothing_and_is_taken_up_again(trained, tmp_path, monkeypatch):
    def interrupt(*arguments, **settings) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("genssl.training.generator.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_generator(recipe(), tmp_path / "out", quiet())
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    train_generator(recipe(), tmp_path / "out", quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    _, folder = trained
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(folder)).read_bytes(), path.name
