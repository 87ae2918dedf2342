"""What a generator says of itself, on the wire."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.base import (
    EmbedsForeground,
    GeneratesExactly,
    HasConditionerFingerprint,
    KeepsEmbeddings,
    ReleasesConditioner,
)
from genssl.generators.spec import GeneratorSpec

SPEC = GeneratorSpec(
    name="flow",
    model="/home/someone/models/mine",
    fingerprint=bytes(range(16)),
    embedding_dim=64,
    image_size=8,
    licence="Apache-2.0",
    defaults={"num_inference_steps": 4, "guidance_scale": 1.5},
    settings={"dtype": "float32", "revision": "None"},
    tflops=None,
    former=lambda: bytes(16),
)


@pytest.mark.parametrize("tflops", [None, 0.25])
def test_the_wire_has_every_fact_and_of_a_path_the_last_part(tflops):
    info = pb.GeneratorInfo(generator_id="mine", **replace(SPEC, tflops=tflops).to_proto())
    told = pb.GeneratorInfo.FromString(info.SerializeToString())
    assert (told.name, told.model, told.fingerprint, told.licence) == ("flow", "mine", SPEC.fingerprint, "Apache-2.0")
    assert (told.embedding_dim, told.image_size, told.tflops) == (64, 8, tflops or 0.0)
    assert dict(told.default_parameters) == SPEC.defaults
    assert dict(told.settings) == SPEC.settings


def test_the_spec_needs_no_torch():
    code = "import sys, genssl.generators.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_abilities_show_in_the_methods_that_there_are(unclip):
    able = (EmbedsForeground, HasConditionerFingerprint, ReleasesConditioner, GeneratesExactly)
    assert all(isinstance(unclip, ability) for ability in able)
    assert not isinstance(unclip, KeepsEmbeddings), "no embedding_cache was asked for"
    assert not any(isinstance(object(), ability) for ability in able)
