"""Weights, embeddings and images that hold NaN or infinities are refused by name, and are no black images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from icgan_checkpoint import official_state, random_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build_tiny_unclip
from tiny_flow import build_tiny_flow
from torchvision.models import resnet50

from genssl.errors import GeneratorError
from genssl.generators.configs import FlowConfig, ICGANConfig, StableUnCLIPConfig
from genssl.generators.finite import check_made, check_weights, is_finite
from genssl.generators.icgan.convert import convert_weights
from genssl.generators.icgan.official import convert_features
from genssl.generators.models import BUILTIN
from genssl.generators.open import open_generator
from genssl.variants.engine import VariantEngine

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
CONFIGS = {"unclip": StableUnCLIPConfig, "flow": FlowConfig, "icgan": ICGANConfig}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    build_tiny_unclip(root / "unclip")
    build_tiny_flow(root / "flow")
    shutil.copytree(BUILTIN / "digits-icgan", root / "icgan")
    return root


def spoil(path: Path, value: float = NAN, name: str | None = None) -> str:
    """Sets one number of a safetensors file, of the largest tensor unless one is named; returns the tensor's name."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    metadata.pop("genssl_digest", None)
    tensors = load_file(path)
    floats = [one for one in tensors if tensors[one].is_floating_point()]
    name = name or max(floats, key=lambda one: tensors[one].numel())
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata)
    return name


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_number_is_found_in_every_dtype(dtype, value):
    tensor = torch.zeros((3, 1001), dtype=dtype)
    assert is_finite(tensor)
    tensor[1, 500] = value
    assert not is_finite(tensor)
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
)
def test_one_is_found_among_floats_of_a_byte(dtype):
    tensor = torch.zeros((3, 1001))
    assert is_finite(tensor.to(dtype))
    tensor[1, 500] = NAN
    assert not is_finite(tensor.to(dtype))
    with pytest.raises(GeneratorError, match=r"weights: a \(1 of 3003 numbers\)"):
        check_weights("here", {"a": tensor.to(dtype)})


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("unclip", "unet/diffusion_pytorch_model.safetensors"),
        ("unclip", "vae/diffusion_pytorch_model.safetensors"),
        ("unclip", "image_encoder/model.safetensors"),
        ("unclip", "text_encoder/model.safetensors"),
        ("unclip", "image_normalizer/diffusion_pytorch_model.safetensors"),
        ("flow", "unet.safetensors"),
        ("flow", "encoder.safetensors"),
        ("icgan", "generator.safetensors"),
        ("icgan", "encoder.safetensors"),
    ],
)
def test_weights_that_are_not_finite_are_refused_where_they_are_loaded(models, tmp_path, model, file):
    folder = Path(shutil.copytree(models / model, tmp_path / model))
    name = spoil(folder / file)
    where = f"{folder / Path(file).parts[0]}.*"
    with pytest.raises(GeneratorError, match=rf"{where}: NaN or infinite weights: {name} \(1 of \d+ numbers\)"):
        open_generator(CONFIGS[model](model=str(folder)), CPU)


def test_weights_too_large_for_float16_say_so(models, tmp_path):
    folder = Path(shutil.copytree(models / "unclip", tmp_path / "unclip"))
    spoil(folder / "unet" / "diffusion_pytorch_model.safetensors", 1e5)
    with pytest.raises(GeneratorError, match=r"too large for float16: set dtype to bfloat16 .* or float32"):
        open_generator(StableUnCLIPConfig(model=str(folder), dtype="float16"), CPU)
    open_generator(StableUnCLIPConfig(model=str(folder)), CPU)


def test_an_adapter_and_a_lora_are_checked(tmp_path):
    from tiny_ip_adapter import make, write_models

    root = write_models(tmp_path)
    tensors = load_file(root / "sd.safetensors")
    tensors["image_proj.proj.bias"][0] = NAN
    save_file(tensors, root / "sd.safetensors")
    with pytest.raises(GeneratorError, match=r"sd.safetensors: NaN or infinite weights: image_proj.proj.bias"):
        make(root)
    tensors["image_proj.proj.bias"][0] = 0.0
    save_file(tensors, root / "sd.safetensors")
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_down.weight": torch.ones(2, 32), f"{layer}.lora_up.weight": torch.ones(32, 2)}
    save_file(lora | {f"{layer}.lora_up.weight": torch.full((32, 2), INF)}, tmp_path / "lora.safetensors")
    with pytest.raises(GeneratorError, match=r"lora.safetensors: NaN or infinite weights: .*lora_up"):
        make(root, lora=str(tmp_path / "lora.safetensors"))
    save_file({name: 2e19 * tensor for name, tensor in lora.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(GeneratorError, match=r"generator.lora, in the UNet: NaN or infinite weights: .*to_q"):
        make(root, lora=str(tmp_path / "lora.safetensors"))


def test_an_official_icgan_is_checked_when_it_is_converted(tmp_path):
    state = official_state(64, 4, random_tensors(0), width=16)
    state["blocks.0.0.conv1.weight"].view(-1)[3] = NAN
    torch.save(state, tmp_path / "G_ema_best0.pth")
    with pytest.raises(GeneratorError, match=r"blocks.0.0.conv1.weight holds NaN or infinite numbers"):
        convert_weights(tmp_path / "G_ema_best0.pth", tmp_path / "swav.pth.tar", tmp_path / "out", "train")
    assert [path.name for path in tmp_path.iterdir()] == ["G_ema_best0.pth"]
    features = resnet50().state_dict()
    features["layer1.0.bn1.running_var"][0] = INF
    with pytest.raises(GeneratorError, match=r"the feature extractor: NaN .*layer1.0.bn1.running_var \(1 of 64"):
        convert_features(features)


def test_an_icgan_that_makes_no_numbers_makes_no_black_images(models):
    generator = open_generator(ICGANConfig(model=str(models / "icgan")), CPU)
    embedding = torch.ones((2, generator.spec.embedding_dim))
    embedding[1] = 3e38  # a number, of which the network's sums are none
    with pytest.raises(GeneratorError, match=r"generator icgan \(icgan\): 1 of 2 images hold NaN .* are damaged"):
        generator.generate(embedding, [1, 2], [generator.spec.defaults] * 2)


@pytest.mark.parametrize("model", ["unclip", "flow"])
def test_diffusion_that_makes_no_numbers_makes_no_black_images(models, model):
    generator = open_generator(CONFIGS[model](model=str(models / model), num_inference_steps=1), CPU)
    embedding = torch.full((1, generator.spec.embedding_dim), 3e38)
    with pytest.raises(GeneratorError, match=rf"generator {generator.spec.name} \({model}\): 1 of 1 images hold NaN"):
        generator.generate(embedding, [1], [generator.spec.defaults])


def test_an_encoder_that_makes_no_numbers_is_named(models, monkeypatch):
    generator = open_generator(FlowConfig(model=str(models / "flow")), CPU)
    images = [np.zeros((3, 8, 8), np.uint8)] * 2
    broken = torch.ones((2, generator.spec.embedding_dim))
    broken[1, 2] = NAN
    monkeypatch.setattr(generator, "embed", lambda batch: broken)
    engine = VariantEngine(generator, [2])
    with pytest.raises(GeneratorError, match=r"generator flow \(flow\), its conditioner: 1 of 2 embeddings hold NaN"):
        engine.embed(images)


def test_the_cause_named_is_that_of_the_dtype():
    made = torch.full((4, 3, 2, 2), NAN)
    with pytest.raises(GeneratorError, match=r"4 of 4 images .*float16 overflowed .set generator.dtype to bfloat16"):
        check_made(made, "x", "images", torch.float16)
    with pytest.raises(GeneratorError, match=r"The weights are damaged .get the model again.*parameter"):
        check_made(made, "x", "images", torch.float32)
    check_made(torch.zeros(2, 3), "x", "images", torch.float32)


def test_many_tensors_are_counted():
    with pytest.raises(GeneratorError, match=r"a \(2 of 2 .*, c \(2 of 2 numbers\) and 2 tensors more"):
        check_weights("here", {name: torch.full((2,), NAN) for name in "abcde"})
