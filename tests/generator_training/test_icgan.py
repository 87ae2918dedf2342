"""Training an IC-GAN: from images to a folder that serves, the same every time, without labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from miniatures import quiet
from miniatures import recipe as parsed

from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.data.load import hold_out
from genssl.errors import ConfigError, UserError
from genssl.generator_training.icgan import Discriminator, ICGANTraining, diff_augment
from genssl.generator_training.loop import Checkpoints, Loop
from genssl.generator_training.rows import Draws, Images
from genssl.generator_training.run import train_generator
from genssl.generators.configs import ICGANConfig
from genssl.generators.icgan.generator import ICGAN
from genssl.generators.models import BUILTIN
from genssl.quality.measures import EFFORTS, Effort

MINIATURE = f"""
name: miniature
family: icgan
dataset: {{name: digits}}
conditioner: {{run: {BUILTIN / "digits-icgan"}}}
generator: {{channels: [16, 16], feature_width: 8, noise_chunk: 4, attention: [0]}}
discriminator: {{channels: [16]}}
adversarial: {{steps: 12, batch_size: 8, translation: 0.125, cutout: 0.25}}
threads: 1
"""


def recipe(text: str = MINIATURE) -> GeneratorRecipe:
    return parsed(text)


@pytest.fixture(scope="module", autouse=True)
def _few_sources():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", Effort(40, 200, 1e8))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generators") / "miniature"
    return train_generator(recipe(), folder, quiet()), folder


def test_the_folder_is_a_generator_with_a_card(trained, digits_test):
    quality, folder = trained
    generator = ICGAN(ICGANConfig(model=str(folder)), torch.device("cpu"))
    image = torch.from_numpy(digits_test.image(0)[None])
    made = generator.generate(generator.embed(image), [7], [generator.spec.defaults])
    assert made.shape == (1, 3, 8, 8)
    assert generator.spec.licence == "Apache-2.0"
    assert json.loads((folder / "card.json").read_text())["dataset"]["labels_used"] is False
    assert [row["truncation"] for row in quality["settings"]] == [0.3, 0.5, 0.7, 1.0, 2.0]
    assert "instance-conditioned GAN" in (folder / "README.md").read_text()


def test_training_again_without_labels_gives_the_same_weights(trained, tmp_path, monkeypatch):
    from genssl.data.digits import Digits

    original = Digits.__init__

    def unlabelled(self, config, split) -> None:
        original(self, config, split)
        self.class_names = None
        self._labels = np.full_like(self._labels, -1)

    monkeypatch.setattr(Digits, "__init__", unlabelled)
    quality = train_generator(recipe(), tmp_path / "again", quiet())
    assert quality["settings"][0]["label_agreement"] is None
    for path in trained[1].rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[16, 16]", "[16, 16, 16]", "generator.channels: 2 blocks make 16 px of 4; the images have 8"),
        ("attention: [0]", "attention: [1]", "there is no block 1; the last one is 0"),
        ("[16, 16]", "[16, 12]", "the channels of block 0 are not a multiple of 8"),
        ("channels: [16]}", "channels: [8, 8, 8, 8]}", "4 blocks cannot halve 8 px that often"),
        ("steps: 12", "steps: 12, neighbours: 5000", "neighbours: must be fewer than the 1437 training images"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_training(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        train_generator(recipe(MINIATURE.replace(old, new)), tmp_path / "out", quiet())
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_says_so(tmp_path):
    text = MINIATURE.replace("steps: 12", "steps: 12, lr_generator: 1.0e+20, lr_discriminator: 1.0e+20")
    with pytest.raises(UserError, match="icgan: the loss became"):
        train_generator(recipe(text), tmp_path / "out", quiet())
    assert list(tmp_path.iterdir()) == []


def test_the_discriminator_scores_image_and_feature_together():
    torch.manual_seed(0)
    discriminator = Discriminator([8], feature_dim=6).eval()
    images, features = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 6)
    scores = discriminator(images, features)
    assert scores.shape == (4,)
    # The projection: the score is affine in the feature, with a slope that depends on the image.
    halfway = discriminator(images, 0.5 * (features + features.flip(0)))
    assert torch.allclose(halfway, 0.5 * (scores + discriminator(images, features.flip(0))), atol=1e-4)
    assert not torch.allclose(discriminator(images.flip(0), features), scores.flip(0), atol=1e-4)


def test_diff_augment_shifts_each_row_and_blanks_a_square():
    images = torch.rand(64, 3, 8, 8, requires_grad=True)
    shifted = diff_augment(images, Draws("shifts"), translation=0.25, cutout=0.0)
    padded = F.pad(images, (2, 2, 2, 2))
    seen = set()
    for row in range(64):
        fitting = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(padded[row, :, 2 - down : 10 - down, 2 - right : 10 - right], shifted[row])
        ]
        assert len(fitting) == 1
        seen.update(fitting)
    assert len(seen) > 15
    shifted.sum().backward()
    assert float(images.grad.max()) == 1.0

    cut = diff_augment(torch.ones(64, 3, 8, 8), Draws("shifts"), translation=0.0, cutout=0.5)
    blank = (cut == 0).sum(dim=(1, 2, 3)) / 3
    assert 1 <= int(blank.min()) < int(blank.max()) == 16
    still = diff_augment(images, Draws("shifts"), translation=0.0, cutout=0.0)
    assert still is images


def test_an_interrupted_training_ends_with_the_same_weights(digits_train, tmp_path):
    dataset = hold_out(digits_train, 0.86)[0]
    images = Images(dataset, torch.device("cpu"))
    features = torch.randn((len(images), 12), generator=torch.Generator().manual_seed(0))

    def train(folder, report) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        loop = Loop(torch.device("cpu"), Checkpoints(folder, every_seconds=0), report)
        return ICGANTraining(recipe(), dataset, loop, folder).train_networks(images, features).state_dict()

    def interrupt(stage: str, step: int, *rest) -> None:
        if step == 7:
            raise KeyboardInterrupt

    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", interrupt)
    resumed = train(tmp_path / "a", lambda stage, step, *rest: steps.append(step))
    assert steps == list(range(7, 13))
    whole = train(tmp_path / "b", lambda *_: None)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
