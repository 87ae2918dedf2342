"""IC-GAN by the generator's contract, and the built-in one of the digits on sources that it never saw."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import kstest, truncnorm

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.configs import ICGANConfig
from genssl.generators.icgan.generator import ICGAN, truncated_normal
from genssl.generators.icgan.networks import Architecture
from genssl.generators.models import BUILTIN
from genssl.quality.measures import SWEEPS, Sweep, measure

CPU = torch.device("cpu")
FOLDER = BUILTIN / "digits-icgan"


@pytest.fixture(scope="module")
def icgan() -> ICGAN:
    return ICGAN(ICGANConfig(model="builtin:digits-icgan"), CPU)


@pytest.fixture(scope="module")
def embeddings(icgan, digits_test) -> torch.Tensor:
    return icgan.embed(torch.from_numpy(np.stack([digits_test.image(row) for row in range(16)])))


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "copy")
    return tmp_path / "copy"


def load(folder, **settings) -> ICGAN:
    return ICGAN(ICGANConfig(model=str(folder), **settings), CPU)


def grey_levels_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def test_rows_with_their_own_truncation_do_not_see_each_other(icgan, embeddings):
    parameters = [{**icgan.spec.defaults, "truncation": 0.1 * row} for row in range(16)]
    seeds = [2**64 - 1 - row for row in range(16)]
    together = icgan.generate(embeddings, seeds, parameters)
    for size in (1, 3, 8):
        parts = [
            icgan.generate(embeddings[i : i + size], seeds[i : i + size], parameters[i : i + size])
            for i in range(0, 16, size)
        ]
        assert grey_levels_apart(torch.cat(parts), together) <= 1
    assert len({image.numpy().tobytes() for image in together}) == 16


def test_a_row_is_bit_equal_at_an_equal_batch_size(icgan, embeddings):
    parameters = [icgan.spec.defaults] * 8
    first = icgan.generate(embeddings[:8], list(range(8)), parameters)
    other_neighbours = icgan.generate(embeddings[[0, *range(8, 15)]], [0, *range(100, 107)], parameters)
    assert torch.equal(first[0], other_neighbours[0])


def test_seed_and_truncation_change_an_image_and_nothing_else_does(icgan, embeddings):
    one = embeddings[:1]

    def image(seed: int, truncation: float) -> torch.Tensor:
        return icgan.generate(one, [seed], [{"truncation": truncation, "best_of": 1}])[0]

    assert torch.equal(image(1, 0.7), image(1, 0.7))
    assert not torch.equal(image(1, 0.7), image(2, 0.7))
    assert not torch.equal(image(1, 0.7), image(1, 1.4))
    assert torch.equal(image(1, 0.0), image(2, 0.0)), "without noise the seed has nothing to say"

    def spread(truncation: float) -> float:
        parameters = [{"truncation": truncation, "best_of": 1}] * 32
        return float(icgan.generate(one.expand(32, -1), range(32), parameters).float().std(dim=0).mean())

    assert spread(1.5) > 1.5 * spread(0.3) > 0


def test_generation_leaves_the_global_random_stream_alone(icgan, embeddings):
    before = torch.random.get_rng_state()
    ICGAN(ICGANConfig(model="builtin:digits-icgan"), CPU)
    icgan.generate(embeddings[:1], [1], [icgan.spec.defaults])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_noise_is_a_truncated_normal():
    for truncation in (0.3, 0.7, 4.0):
        bound = 2 * truncation
        drawn = truncated_normal((20_000,), truncation, seed=3)
        assert float(drawn.abs().max()) <= bound
        assert kstest(drawn.numpy(), truncnorm(-bound, bound).cdf).pvalue > 1e-3


def test_the_best_of_several_tries_is_nearest_to_the_source(icgan, embeddings):
    one, four = ([{"truncation": 1.5, "best_of": tries}] * 16 for tries in (1, 4))
    first = icgan.generate(embeddings, range(16), one)
    best = icgan.generate(embeddings, range(16), four)
    near_first, near_best = (
        torch.nn.functional.cosine_similarity(icgan.embed(images), embeddings) for images in (first, best)
    )
    assert bool((near_best >= near_first - 1e-5).all())
    assert float(near_best.mean()) > float(near_first.mean())
    kept = [torch.equal(a, b) for a, b in zip(first, best, strict=True)]
    assert any(kept), "where the first try is the best, it is the image"
    assert not all(kept)
    alone = icgan.generate(embeddings[3:4], [3], four[:1])
    assert grey_levels_apart(alone[0], best[3]) <= 1
    assert icgan.batch_key(one[0]) != icgan.batch_key(four[0])
    assert icgan.batch_key(one[0]) == icgan.batch_key({**one[0], "truncation": 0.2})


def test_fingerprint_names_weights_dtype_and_size_but_not_the_card(icgan, copy):
    (copy / "README.md").write_text("words")
    original = icgan.spec.fingerprint
    assert load(copy).spec.fingerprint == original
    assert load(copy, truncation=0.1).spec.fingerprint == original, "parameters are in a variant's key already"
    assert load(copy, dtype="bfloat16").spec.fingerprint != original
    assert load(copy, output_size=16).spec.fingerprint != original
    for name in ("generator.safetensors", "encoder.safetensors"):
        data = bytearray((copy / name).read_bytes())
        data[-3] ^= 1
        (copy / name).write_bytes(data)
        assert load(copy).spec.fingerprint != original
        original = load(copy).spec.fingerprint


def test_output_size_and_bfloat16(copy, embeddings):
    generator = load(copy, output_size=24, dtype="bfloat16")
    assert generator.spec.image_size == 24
    exact = load(copy, output_size=24).generate(embeddings, range(16), [generator.spec.defaults] * 16)
    made = generator.generate(embeddings, range(16), [generator.spec.defaults] * 16)
    assert made.shape == (16, 3, 24, 24)
    assert float((made.float() - exact.float()).abs().mean()) < 3
    assert generator.preprocess(np.zeros((3, 33, 71), np.uint8)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("truncation", -0.1, r"truncation: -0.1 is outside 0\.\.4"),
        ("truncation", math.nan, "truncation: nan is outside"),
        ("best_of", 0, r"best_of: 0 is outside 1\.\.64"),
    ],
)
def test_impossible_parameters_are_refused(icgan, name, value, message):
    with pytest.raises(RequestRefusedError, match=message):
        icgan.check({**icgan.spec.defaults, name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"class_id": 1}, "not class-conditional"), ({"preprocess": "colab"}, "not made of official weights")],
)
def test_settings_of_official_models_are_refused(settings, message):
    with pytest.raises(GeneratorError, match=message):
        load("builtin:digits-icgan", **settings)


def change_facts(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_do_not_hold_together_are_refused(copy, tmp_path):
    facts = json.loads((copy / "config.json").read_text())
    with pytest.raises(GeneratorError, match="no built-in model 'digit-icgan'; did you mean 'digits-icgan'"):
        load("builtin:digit-icgan")
    for change, message in [
        ({"format": "genssl-icgan/9"}, "format 'genssl-icgan/9' is not 'genssl-icgan/1'"),
        ({"preprocess": "none"}, "preprocess 'none' is not train, colab or raw"),
        ({"architecture": {"bottom": 4}}, "architecture: no feature_dim, feature_width"),
        ({"architecture": facts["architecture"] | {"depth": 1}}, "architecture: unknown keys depth"),
        ({"architecture": facts["architecture"] | {"bottom": 0}}, "whole numbers above 0"),
        ({"architecture": facts["architecture"] | {"feature_width": 7}}, "does not fit the architecture"),
        ({"_class_name": "Flow"}, "the model is a Flow; this generator needs a GensslICGAN"),
    ]:
        change_facts(copy, **facts | change)
        with pytest.raises(GeneratorError, match=message):
            load(copy)
    change_facts(copy, **facts)
    weights = load_file(copy / "generator.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if name != "first.bias"}, copy / "generator.safetensors"
    )
    with pytest.raises(GeneratorError, match=r"does not fit the architecture.*first\.bias"):
        load(copy)
    (copy / "generator.safetensors").write_bytes(b"cut")
    with pytest.raises(GeneratorError, match="cannot be read as safetensors"):
        load(copy)
    (copy / "encoder.safetensors").unlink()
    with pytest.raises(GeneratorError):
        load(copy)


def test_an_architecture_must_make_sense():
    good = {"feature_dim": 8, "feature_width": 8, "noise_chunk": 4, "bottom": 4, "channels": [8, 8]}
    assert Architecture.from_json(good).resolution == 8
    for change in ({"channels": [8]}, {"attention": [1]}, {"classes": 3}, {"channels": [8] * 20}, {"bottom": 2.5}):
        with pytest.raises(ValueError, match=r"sizes|blocks|classes"):
            Architecture.from_json(good | change)


def test_variants_of_held_out_digits_keep_their_class_and_differ(icgan, digits_train, digits_test, monkeypatch):
    """The quality card's own measure, which the README of the model quotes, at the default truncation."""
    monkeypatch.setitem(SWEEPS, "icgan", Sweep({"best_of": 1}, ({"truncation": 0.7},)))
    made = measure(icgan, digits_train, digits_test)["settings"][0]
    assert made["label_agreement"] >= 0.88
    assert made["distance_within_source"] >= 0.3
    written = json.loads((FOLDER / "quality.json").read_text())["settings"]
    card = next(row for row in written if row["truncation"] == 0.7)
    assert abs(card["label_agreement"] - made["label_agreement"]) <= 0.01


def test_the_model_is_small_and_has_a_card_and_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    card = (FOLDER / "README.md").read_text()
    for words in ("genssl train-generator", "no labels", "Apache-2.0", "label agreement"):
        assert words in card
