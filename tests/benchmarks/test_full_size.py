"""Variants a second of Stable unCLIP at its public size, random weights, by batch, dtype and compile; needs a GPU.

`pytest tests/benchmarks/test_full_size.py --benchmark-only -s`; prints one line a combination. The weights do not
matter for speed. 256 pixels and 10 guided steps (4.24 TFLOP a variant), so that all combinations take some minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from full_size import build_full_size_unclip

from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.stable_unclip import StableUnCLIP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    return build_full_size_unclip(tmp_path_factory.mktemp("models") / "full")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_variants_a_second(benchmark, full, batch, dtype, compiled):
    config = StableUnCLIPConfig(model=str(full), image_size=256, dtype=dtype, compile=compiled)
    generator = StableUnCLIP(config, torch.device("cuda"))
    embeddings = torch.randn(batch, 768, generator=torch.Generator().manual_seed(0))
    parameters = [generator.spec.defaults] * batch
    # `generate` ends with a copy to the CPU, which waits for the device.
    benchmark.pedantic(
        generator.generate, (embeddings, list(range(batch)), parameters), rounds=5, iterations=1, warmup_rounds=2
    )
    rate, tflops = batch / benchmark.stats.stats.median, generator.spec.tflops
    print(f"\nbatch {batch}, {dtype}, {config.compile=}: {rate:.2f} variants/s, {rate * tflops:.0f} TFLOP/s")
