"""The three families on a CUDA device: in bf16 and channels_last, looked at on the way, and again from the CPU."""

from __future__ import annotations

import pytest
import torch
from miniatures import FLOW, ICGAN, UNCLIP, judge_little, quiet, recipe
from safetensors.torch import load_file

from genssl.generator_training.run import train_generator
from genssl.generators.open import open_generator
from genssl.registry import GENERATORS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FAST = "device: cuda\nprecision: bf16\nchannels_last: true\naccumulate: 2\n"
WATCHED = "validation_fraction: 0.5\nmonitor: {every_steps: 3, sources: 32, patience: 9}\n"
DISTILLED = "distill: {steps: 1, training_steps: 4, batch_size: 16}\n"


@pytest.mark.parametrize(
    ("generator", "text"),
    [("flow", FLOW + DISTILLED), ("icgan", ICGAN), ("stable_unclip", UNCLIP)],
    ids=["flow", "icgan", "stable_unclip"],
)
def test_a_family_trains_on_the_device(tmp_path, monkeypatch, generator, text):
    judge_little(monkeypatch)
    quality = train_generator(recipe(text + FAST + WATCHED), tmp_path / "out", quiet())
    assert quality["settings"]
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point())
    config = GENERATORS.config(generator)(model=str(tmp_path / "out"))
    assert open_generator(config, torch.device("cpu")).spec.image_size == 8
