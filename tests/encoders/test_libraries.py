"""FID's Inception through torch-fidelity: its features, from weights that are read without running code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from genssl.encoders.load import EncoderError, load_encoder

CPU = torch.device("cpu")


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(EncoderError, match=r"torch-fidelity is not installed; run `pip install 'genssl\[metrics\]'`"):
        load_encoder("inception-v3", CPU)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights of the right shapes, in the file's format."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    empty = tmp_path_factory.mktemp("weights") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda self, tensors: None)
        torch.save({}, empty)
        torch.save(extractor("random", ["2048"], feature_extractor_weights_path=str(empty)).state_dict(), empty)
    return empty


def test_features_are_torch_fidelitys(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    encoder = load_encoder(f"inception-v3:{weights}", CPU)
    assert encoder.image_size is None, "it resizes what it gets"
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs: Any = FeatureExtractorInceptionV3("again", ["2048"], feature_extractor_weights_path=str(weights))
    assert torch.equal(encoder.module.encode(images.float() / 255), theirs(images)[0])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_weights_that_are_absent_hold_code_or_fit_nothing_are_one_sentence(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(EncoderError, match=r"the weights are not in .*; put https://.* there, or fetch them"):
        load_encoder("inception-v3", CPU)
    torch.save({"fc.weight": Evil()}, "evil.pth")
    with pytest.raises(EncoderError, match=r"evil.pth"):
        load_encoder("inception-v3:evil.pth", CPU)
    assert not Path("ran").exists()
    torch.save({"fc.weight": torch.zeros(3)}, "other.pth")
    with pytest.raises(EncoderError, match=r"other.pth: is not torch-fidelity's Inception"):
        load_encoder("inception-v3:other.pth", CPU)
