"""Generators of latents: an autoencoder given or trained here; and a Stable unCLIP that sees with any encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from miniatures import FLOW, UNCLIP, judge_little, problems, quiet, recipe

from genssl.errors import ConfigError, UserError
from genssl.generator_training.run import train_generator
from genssl.generators.configs import FlowConfig, StableUnCLIPConfig
from genssl.generators.diffusion.sampling import row_noise
from genssl.generators.diffusion.stable_unclip import StableUnCLIP
from genssl.generators.flow import Flow
from genssl.generators.models import BUILTIN

CPU = torch.device("cpu")
TRAINED = "autoencoder: {block_out_channels: [8, 8], latent_channels: 2, epochs: 1}\n"
CONDITIONED = UNCLIP.replace(
    "image_encoder: {hidden_size: 16, num_layers: 1, num_heads: 2, embedding_dim: 16, epochs: 1}",
    f"conditioner: {{run: {BUILTIN / 'digits-flow'}}}",
)


WITHOUT = CONDITIONED.replace("autoencoder: {block_out_channels: [8, 8], epochs: 1}\n", "")


@pytest.fixture(autouse=True)
def little_to_judge(monkeypatch) -> None:
    judge_little(monkeypatch)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """An autoencoder as others publish them: random weights, a scaling factor of its own."""
    folder = tmp_path_factory.mktemp("models") / "vae"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=3,
            norm_num_groups=4,
            scaling_factor=0.7,
        )
    autoencoder.save_pretrained(folder)
    return folder


def changed(given: Path, folder: Path, **facts) -> Path:
    shutil.copytree(given, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | facts))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return AutoencoderKL.from_pretrained(folder).state_dict()


def test_a_flow_of_latents_decodes_where_its_steps_end(tmp_path, digits_test):
    train_generator(recipe(FLOW + TRAINED), tmp_path / "flow", quiet())
    assert json.loads((tmp_path / "flow" / "config.json").read_text())["latents"] == {"channels": 2, "size": 4}
    generator = Flow(FlowConfig(model=str(tmp_path / "flow"), num_inference_steps=1), CPU)
    assert generator.spec.image_size == 8
    embeddings = generator.embed(torch.stack([torch.from_numpy(digits_test.image(row)) for row in range(3)]))
    made = generator.generate(embeddings, [1, 2, 3], [generator.spec.defaults] * 3)
    _, noise = row_noise([1, 2, 3], (embeddings.shape[1],), (2, 4, 4))
    condition = torch.cat([embeddings, torch.zeros(3, 1)], dim=1)
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "flow" / "vae")
    with torch.inference_mode():
        latents = noise + generator._output(noise, 0.0, condition, {}, 0)
        images = autoencoder.decode(latents / autoencoder.config["scaling_factor"]).sample
    wanted = ((images / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (wanted - made).abs().max() <= 1
    assert made.float().std() > 5


def test_a_trained_autoencoder_gives_latents_of_spread_one(tmp_path, digits_train):
    train_generator(recipe(FLOW + TRAINED), tmp_path / "flow", quiet())
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "flow" / "vae")
    images = torch.stack([torch.from_numpy(digits_train.image(row)) for row in range(len(digits_train))])
    with torch.inference_mode():
        latents = autoencoder.encode(images.float() / 127.5 - 1).latent_dist.mean
    assert float(latents.std() * autoencoder.config["scaling_factor"]) == pytest.approx(1, rel=1e-3)


def test_latents_that_are_not_kept_train_the_same(tmp_path, monkeypatch):
    """Images that do not fit into memory are read, and encoded, when their rows are drawn."""
    train_generator(recipe(FLOW + TRAINED), tmp_path / "kept", quiet())
    monkeypatch.setattr("genssl.generator_training.rows.Images.__init__.__defaults__", (0,))
    train_generator(recipe(FLOW + TRAINED), tmp_path / "read", quiet())
    kept, read = ((tmp_path / name / "unet.safetensors").read_bytes() for name in ("kept", "read"))
    assert len(kept) == len(read)
    a, b = (torch.frombuffer(bytearray(one[-4000:]), dtype=torch.float32) for one in (kept, read))
    assert torch.allclose(a, b, atol=1e-3), "but for the rounding of batches of another size"


@pytest.mark.parametrize("text", [FLOW, WITHOUT])
def test_a_given_autoencoder_is_used_as_it_is(tmp_path, given, text):
    train_generator(recipe(text + f"autoencoder: {{model: {given}}}\n"), tmp_path / "out", quiet())
    ours, theirs = tensors(tmp_path / "out" / "vae"), tensors(given)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"] == 0.7


def test_an_autoencoder_that_does_not_fit_is_refused_before_training(tmp_path, given):
    for model, message in (
        (tmp_path / "nowhere", "autoencoder.model: .*nowhere' is neither a folder here nor a hub id"),
        (changed(given, tmp_path / "shifted", shift_factor=0.1), "shifts its latents .shift_factor 0.1."),
        (changed(given, tmp_path / "other", _class_name="VQModel"), "autoencoder.model: .*VQModel"),
    ):
        with pytest.raises(UserError, match=message):
            train_generator(recipe(FLOW + f"autoencoder: {{model: {model}}}\n"), tmp_path / "out", quiet())
    text = FLOW + "autoencoder: {block_out_channels: [8, 8, 8, 8, 8]}\n"
    with pytest.raises(ConfigError, match=r"images of 8 pixels do not divide into latents of 1/16 the side"):
        train_generator(recipe(text), tmp_path / "out", quiet())
    with pytest.raises(ConfigError, match=r"flow.block_out_channels: 2 levels do not fit latents of 1 pixels"):
        train_generator(recipe(text.replace("8, 8, 8, 8, 8", "8, 8, 8, 8")), tmp_path / "out", quiet())
    assert not (tmp_path / "out").exists()


# ---- A Stable unCLIP that sees with an encoder of genssl ----


def test_a_stable_unclip_is_trained_on_the_features_of_any_encoder(tmp_path, digits_test):
    train_generator(recipe(CONDITIONED), tmp_path / "out", quiet())
    assert not (tmp_path / "out" / "image_encoder").exists()
    assert (tmp_path / "out" / "encoder.safetensors").is_file()
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0}
    generator = StableUnCLIP(StableUnCLIPConfig(model=str(tmp_path / "out"), **settings), CPU)
    flow = Flow(FlowConfig(model="builtin:digits-flow"), CPU)
    images = torch.stack([torch.from_numpy(digits_test.image(row)) for row in range(3)])
    assert torch.equal(generator.embed(images), flow.embed(images))
    made = generator.generate(generator.embed(images), [1, 2, 3], [generator.spec.defaults] * 3)
    assert made.shape == (3, 3, 8, 8)
    assert made.float().std() > 5


def test_a_backbone_can_be_trained_for_it(tmp_path):
    backbone = "{backbone: {name: resnet18, stem: small, width: 4}, epochs: 1, projector_hidden_dim: 16}"
    text = CONDITIONED.replace(f"{{run: {BUILTIN / 'digits-flow'}}}", backbone)
    train_generator(recipe(text), tmp_path / "out", quiet())
    assert StableUnCLIP(StableUnCLIPConfig(model=str(tmp_path / "out")), CPU).spec.embedding_dim == 32


def test_it_sees_with_one_encoder_alone():
    assert problems(UNCLIP + f"conditioner: {{run: {BUILTIN / 'digits-flow'}}}\n") == [
        "miniature.yaml:9: conditioner: it takes the place of `image_encoder`; give one of them"
    ]
