"""The public model's size, without its weights: parameters, cost, and one step from source to image."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from full_size import UNET, VAE, build_full_size_unclip

from genssl.generators.base import count_tflops
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.stable_unclip import StableUnCLIP


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return build_full_size_unclip(tmp_path_factory.mktemp("models") / "full")


def test_size_and_cost_of_the_public_configuration():
    with torch.device("meta"):
        unet, vae, tiny = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE), AutoencoderTiny()
    assert sum(value.numel() for value in unet.parameters()) == pytest.approx(869.5e6, abs=0.1e6)
    assert sum(value.numel() for value in vae.decoder.parameters()) == pytest.approx(49.5e6, abs=0.1e6)

    def denoise(side: int) -> float:
        latents = (torch.zeros(1, 4, side // 8, side // 8, device="meta"), torch.zeros(1, device="meta"))
        text, image = torch.zeros(1, 77, 1024, device="meta"), torch.zeros(1, 1536, device="meta")
        return count_tflops(lambda: unet(*latents, encoder_hidden_states=text, class_labels=image))

    # The values of diffusers 0.42 under torch's counter, batch of one.
    assert denoise(256) == pytest.approx(0.181, rel=0.01)
    assert denoise(768) == pytest.approx(2.149, rel=0.01)
    latents = torch.zeros(1, 4, 32, 32, device="meta")
    assert count_tflops(lambda: vae.decoder(latents)) == pytest.approx(0.622, rel=0.01)
    assert count_tflops(lambda: tiny.decoder(latents)) == pytest.approx(0.035, rel=0.02)


@pytest.mark.slow
def test_one_step_at_full_size(full):
    """From a source to its variant at 128 pixels, in float32: 3.8 GB of weights."""
    config = StableUnCLIPConfig(model=str(full), image_size=128, num_inference_steps=1, guidance_scale=1.0)
    generator = StableUnCLIP(config, torch.device("cpu"))
    assert generator.spec.embedding_dim == 768
    image = np.random.default_rng(0).integers(0, 256, (3, 300, 400), dtype=np.uint8)
    embedding = generator.embed(torch.from_numpy(generator.preprocess(image)[None]))
    made = generator.generate(embedding, [1], [generator.spec.defaults])
    assert made.shape == (1, 3, 128, 128)
    assert float(made.float().std()) > 1, "a picture, not one grey"
    assert generator.spec.tflops == pytest.approx(0.2, rel=0.05), "about a quarter of the cost at 256 pixels"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_papers_setting_on_a_gpu(full, compiled):
    config = StableUnCLIPConfig(preset="unclip-paper", model=str(full), compile=compiled)
    generator = StableUnCLIP(config, torch.device("cuda"))
    embeddings, parameters = torch.randn(4, 768, generator=torch.Generator().manual_seed(0)), generator.spec.defaults
    generator.generate(embeddings, [1, 2, 3, 4], [parameters] * 4)
    started = time.perf_counter()
    made = generator.generate(embeddings, [1, 2, 3, 4], [parameters] * 4)
    print(f"\n{4 / (time.perf_counter() - started):.2f} variants/s, compile {compiled}")
    assert made.shape == (4, 3, 224, 224)
    assert float(made.float().std()) > 1
    assert generator.spec.tflops == pytest.approx(48.7, rel=0.01)
