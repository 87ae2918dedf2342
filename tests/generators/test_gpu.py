"""What needs a CUDA device; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssl.base.devices import stream
from genssl.config.recipe import AugmentationConfig
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.stable_unclip import StableUnCLIP
from genssl.views.augment import Augment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_a_gpu_makes_the_variants_of_the_cpu(unclip, digits_test):
    config = StableUnCLIPConfig(
        model="builtin:digits-unclip", num_inference_steps=2, guidance_scale=1.0, noise_level=300
    )
    on_gpu = StableUnCLIP(config, torch.device("cuda"))
    images = torch.from_numpy(np.stack([digits_test.image(row) for row in range(64)]))
    made = [
        generator.generate(generator.embed(images), list(range(64)), [unclip.spec.defaults] * 64).numpy().astype(int)
        for generator in (unclip, on_gpu)
    ]
    # Convolutions run in TF32 by default, so a few grey levels apart is right and a wrong image is not.
    assert np.abs(made[0] - made[1]).mean() <= 2


def test_views_on_a_gpu_equal_those_on_the_cpu():
    images = torch.rand((32, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    augment = Augment(AugmentationConfig(), 24)
    on_cpu, on_gpu = (augment(images.to(device), stream("gpu")).cpu() for device in ("cpu", "cuda"))
    assert float((on_cpu - on_gpu).abs().max()) <= 1 / 255
