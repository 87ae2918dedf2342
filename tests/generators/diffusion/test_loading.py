"""Folders that hold their weights in half precision alone, as diffusers writes `variant="fp16"`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from safetensors.torch import load_file
from tiny import build_tiny_unclip

from genssl.errors import GeneratorError
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.fingerprint import network_files
from genssl.generators.open import open_generator

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return build_tiny_unclip(tmp_path_factory.mktemp("models") / "plain")


def as_variant(plain: Path, folder: Path, **settings) -> Path:
    StableUnCLIPImg2ImgPipeline.from_pretrained(plain, torch_dtype=torch.float16).save_pretrained(folder, **settings)
    return folder


def made(folder: Path) -> tuple[torch.Tensor, bytes]:
    generator = open_generator(StableUnCLIPConfig(model=str(folder), num_inference_steps=2), CPU)
    embedding = generator.embed(torch.full((1, 3, 32, 32), 90, dtype=torch.uint8))
    return generator.generate(embedding, [1], [generator.spec.defaults]), generator.spec.fingerprint


@pytest.mark.parametrize("shards", ["one file", "several"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_of_a_variant_alone_loads_and_its_weights_count(plain, tmp_path, variant, shards):
    size = {} if shards == "one file" else {"max_shard_size": "200KB"}
    folder = as_variant(plain, tmp_path / "variant", variant=variant, **size)
    weights = [path.name for path in folder.rglob("*.safetensors")]
    assert weights
    assert all(variant in name for name in weights)
    images, fingerprint = made(folder)
    # The same half-precision weights under the ordinary names.
    same, _ = made(as_variant(plain, tmp_path / "same"))
    assert torch.equal(images, same)
    unet = network_files(folder, "unet")
    assert len([name for name in unet if name.endswith(".safetensors")]) > (shards == "several")
    assert all((folder / name).is_file() for name in unet)
    path = folder / unet[-1]
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert made(folder)[1] != fingerprint


def test_a_variant_beside_the_whole_weights_is_left_alone(plain, tmp_path):
    before = made(plain)[1]
    variant = plain / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    variant.write_bytes(b"damaged")
    try:
        assert made(plain)[1] == before
        assert load_file(plain / network_files(plain, "unet")[1])
    finally:
        variant.unlink()


def test_weights_of_a_variant_that_nobody_asked_for_are_not_taken(plain, tmp_path):
    folder = as_variant(plain, tmp_path / "ema", variant="ema")
    with pytest.raises(GeneratorError, match="cannot be loaded as CLIPVisionModelWithProjection"):
        made(folder)
