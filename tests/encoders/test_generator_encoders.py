"""The conditioner of a generator, taken for an encoder, gives the embeddings that the generator works with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import build_own_unclip, build_tiny_unclip

from genssl.encoders.load import load_encoder
from genssl.errors import GeneratorError, UserError
from genssl.registry import GENERATORS

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "name"), [("stable_unclip", "digits-unclip"), ("flow", "digits-flow"), ("icgan", "digits-icgan")]
)
def test_the_embeddings_are_the_generators(kind, name, digits_test):
    images = torch.from_numpy(np.stack([digits_test.image(row) for row in range(8)]))
    generator = GENERATORS.get(kind)(GENERATORS.config(kind)(model=f"builtin:{name}"), CPU)
    encoder = load_encoder(f"builtin:{name}", CPU)
    assert encoder.image_size == 8
    assert encoder.source["kind"] == "generator"
    found, expected = encoder.module.encode(images.float() / 255), generator.embed(images)
    if kind != "stable_unclip":  # flow and IC-GAN scale their features to one length
        found, expected = F.normalize(found, dim=1), F.normalize(expected, dim=1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_stable_unclip_with_an_encoder_of_genssl_gives_that_encoders_features(tmp_path):
    folder = build_own_unclip(tmp_path / "own", build_tiny_unclip(tmp_path / "clip"))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    generator = GENERATORS.get("stable_unclip")(GENERATORS.config("stable_unclip")(model=str(folder)), CPU)
    encoder = load_encoder(str(folder), CPU)
    assert encoder.image_size == 32
    assert (encoder.source["kind"], encoder.source["backbone"]["name"]) == ("generator", "resnet18")
    found, expected = encoder.module.encode(images.float() / 255), generator.embed(images)
    assert torch.allclose(F.normalize(found, dim=1), F.normalize(expected, dim=1), atol=1e-5)
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(GeneratorError, match=r"own: holds no image encoder"):
        load_encoder(str(folder), CPU)


def test_what_is_no_generator_with_a_conditioner_is_one_sentence(tmp_path):
    with pytest.raises(GeneratorError, match="no such built-in generator; there are digits-flow"):
        load_encoder("builtin:digits-unclop", CPU)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="is a StableDiffusionPipeline; the conditioner of a StableUnCLIPImg2Img"):
        load_encoder(str(tmp_path), CPU)
