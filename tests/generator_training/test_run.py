"""Training a generator: from images to a folder that diffusers loads, the same every time, whole or not at all."""

from __future__ import annotations

import io
import json
import signal

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from miniatures import FLOW, ICGAN, UNCLIP, quiet
from miniatures import recipe as parsed
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images

from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.errors import ConfigError, UserError
from genssl.generator_training.run import train_generator
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.stable_unclip import StableUnCLIP

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
    assert quality["sources"] == 256, "a quick look"
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
            "threads: 1",
            "threads: 1\naccumulate: 719",
            "autoencoder.batch_size: 128 does not divide among 719 micro-batches",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_training(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        train_generator(recipe(MINIATURE.replace(old, new)), tmp_path / "out", quiet())
    assert list(tmp_path.iterdir()) == []


def test_weights_are_published_before_they_are_measured_and_the_same_command_measures_them(
    trained, tmp_path, monkeypatch
):
    def interrupt(*arguments, **settings) -> None:
        raise KeyboardInterrupt

    said, out = io.StringIO(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("genssl.generator_training.run.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_generator(recipe(), out, Console(file=said), "genssl train-generator mine")
    assert "Measure with: genssl train-generator mine" in said.getvalue()
    whole = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")}
    _, folder = trained
    assert whole == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert not (out / "quality.json").exists()
    assert "Not measured" in (out / "README.md").read_text()

    quality = train_generator(recipe(), out, quiet())
    assert quality["settings"][0]["label_agreement"] == trained[0]["settings"][0]["label_agreement"]
    assert json.loads((out / "quality.json").read_text()) == quality
    assert "| noise level |" in (out / "README.md").read_text()
    assert whole == {path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")}
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing of the making is left"
    with pytest.raises(UserError, match="exists already"):
        train_generator(recipe(), out, quiet())


def test_the_measuring_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("genssl.generator_training.run.measure", None)  # it would fail
    assert train_generator(recipe(f"{FLOW}quality: none\n"), tmp_path / "out", quiet()) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "quality.json").exists()
    assert "Not measured" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "stage"), [(FLOW, "flow"), (ICGAN, "icgan"), pytest.param(UNCLIP, "denoiser", marks=pytest.mark.slow)]
)
def test_a_signal_saves_after_the_step_says_how_to_go_on_and_leads_to_the_same_weights(tmp_path, text, stage):
    """The signal comes before the third step of the last stage; what the command line does at it is raised here."""

    class Interrupted(BaseException):
        pass

    def interrupt(number, frame) -> None:
        raise Interrupted

    class Told(io.StringIO):
        def write(self, line: str) -> int:
            if line.startswith(f"{stage}: step 2/6"):
                signal.raise_signal(signal.SIGINT)
            return super().write(line)

    said, before = Told(), signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(Interrupted):
            train_generator(recipe(f"{text}quality: none\n"), tmp_path / "out", Console(file=said, width=200), "again!")
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"stopped after {stage}, step 3 of 6; saved. Go on with: again!" in said.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    more = io.StringIO()
    train_generator(recipe(f"{text}quality: none\n"), tmp_path / "out", Console(file=more, width=200))
    assert f"{stage}: step 3/6" not in more.getvalue(), "that one was done"
    assert f"{stage}: step 4/6" in more.getvalue()
    train_generator(recipe(f"{text}quality: none\n"), tmp_path / "whole", quiet())
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes(), path.name


def test_48_images_in_a_flat_folder_are_enough_and_batches_say_that_they_are_smaller(tmp_path):
    photo = load_sample_images().images[0]
    (tmp_path / "photos").mkdir()
    for number in range(48):
        Image.fromarray(photo[number : number + 90, 4 * number : 4 * number + 70]).save(
            tmp_path / "photos" / f"{number}.jpg"
        )
    small = f"""
name: few
family: flow
dataset: {{name: folder, root: "{tmp_path}/photos", image_size: 16}}
conditioner: {{backbone: {{name: resnet10, stem: small, width: 4, stages: 2}}, epochs: 1}}
flow: {{block_out_channels: [16, 16], steps: 6, batch_size: 64}}
monitor: {{every_steps: 6}}
threads: 1
"""
    said = io.StringIO()
    quality = train_generator(recipe(small), tmp_path / "out", Console(file=said, width=300))
    images = 48 - quality["sources"]
    assert (
        f"conditioner.batch_size: 256 is more than the {images} training images; {images} is taken" in said.getvalue()
    )
    assert f"flow.batch_size: 64 is more than the {images} training images; {images} is taken" in said.getvalue()
    assert "no sub-folders that could be classes, so no labels" in said.getvalue()
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["recipe"]["flow"]["batch_size"] == images
    assert quality["label_agreement_by"] == "no labels"
