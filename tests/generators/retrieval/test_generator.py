"""Retrieval, its bank, and interpolation between neighbours."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from genssl.backbones.configs import ResNet18Config
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.configs import RetrievalConfig, StableUnCLIPConfig
from genssl.generators.open import open_generator
from genssl.generators.retrieval.bank import Bank, open_bank
from genssl.generators.retrieval.configs import BankConfig
from genssl.generators.retrieval.interpolation import slerp
from genssl.variants.engine import VariantEngine

CPU = torch.device("cpu")
ENCODER = "builtin:digits-flow"


@pytest.fixture(scope="module")
def retrieval():
    return open_generator(RetrievalConfig(bank={"images": "digits"}, encoder=ENCODER), CPU)


def embedded(generator, dataset, rows):
    return generator.embed(torch.stack([torch.from_numpy(generator.preprocess(dataset.image(row))) for row in rows]))


def test_variants_are_the_nearest_images_but_the_source(retrieval, digits_train):
    rows = list(range(10))
    everything = torch.nn.functional.normalize(embedded(retrieval, digits_train, range(len(digits_train))), dim=1)
    seeds = list(range(40))
    for row in rows:
        embedding = embedded(retrieval, digits_train, [row])
        made = retrieval.generate(embedding.expand(40, -1), seeds, [{"neighbours": 4}] * 40)
        cosines = everything @ everything[row]
        cosines[cosines > 1 - 1e-6] = -1
        nearest = [digits_train.image(int(one)).tobytes() for one in cosines.topk(4).indices]
        counts = Counter(image.numpy().tobytes() for image in made)
        assert set(counts) == set(nearest), "each of the four is drawn, and nothing else"
        assert digits_train.image(row).tobytes() not in counts


def test_a_row_does_not_depend_on_its_batch(retrieval, digits_test):
    engine = VariantEngine(retrieval, [1, 4, 16])
    embeddings, _ = engine.embed([retrieval.preprocess(digits_test.image(row)) for row in range(12)])
    settings = engine.complete({})
    rows = [engine.row(digits_test.source_id(i), embeddings[i], 3, settings) for i in range(12)]
    together, _ = engine.generate(rows)
    alone = np.concatenate([engine.generate([row])[0] for row in rows])
    assert np.array_equal(together, alone)


def test_neighbours_of_a_digit_are_mostly_the_same_digit(retrieval, digits_train, digits_test):
    labels = {digits_train.image(row).tobytes(): digits_train.label(row) for row in range(len(digits_train))}
    made = retrieval.generate(embedded(retrieval, digits_test, range(60)), range(60), [{"neighbours": 5}] * 60)
    agreeing = [labels[image.numpy().tobytes()] == digits_test.label(row) for row, image in enumerate(made)]
    assert np.mean(agreeing) > 0.8


def test_copies_of_the_source_are_left_out_however_many_there_are(digits_train):
    embeddings = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    embeddings[:50] = embeddings[0]
    bank = Bank(digits_train, bytes(16), embeddings, CPU)
    found = bank.neighbours(embeddings[0], 5)
    assert len(found) == 5
    assert min(found) >= 50
    with pytest.raises(GeneratorError, match="no image but copies"):
        Bank(digits_train, bytes(16), embeddings[:50], CPU).drawn(embeddings[0], 3, 0)


def test_the_fingerprint_covers_bank_and_encoder_and_k_is_a_parameter(retrieval, tmp_path):
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    images = {"name": "folder", "root": tmp_path, "labels": "none", "image_size": 8}

    def made(**settings):
        return open_generator(RetrievalConfig(**{"bank": {"images": images}, "encoder": ENCODER} | settings), CPU)

    first = made(neighbours=3)
    assert first.spec.fingerprint == made(neighbours=5).spec.fingerprint
    engine = VariantEngine(first, [1])
    assert engine.complete({"neighbours": 3}).digest != engine.complete({"neighbours": 5}).digest
    others = [retrieval, made(neighbours=3, encoder="builtin:digits-unclip"), made(neighbours=3, output_size=16)]
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "more.png")
    others.append(made(neighbours=3))
    assert len({one.spec.fingerprint for one in [first, *others]}) == 5
    assert RetrievalConfig(bank={"images": str(tmp_path)}, encoder=ENCODER).bank.images.root == tmp_path  # type: ignore[attr-defined]
    with pytest.raises(RequestRefusedError, match="neighbours: 500 is outside 1"):
        first.check({"neighbours": 500})


def test_kept_embeddings_are_read_again_and_those_of_another_encoder_refused(tmp_path, retrieval):
    path = tmp_path / "bank.safetensors"
    config = BankConfig(images="digits", embeddings=path)
    seen = []

    def embed(images):
        seen.append(len(images))
        return retrieval.embed(images)

    fresh = open_bank(config, retrieval.preprocess, embed, bytes(16), CPU)
    assert sum(seen) == len(fresh) == len(load_file(path)["embeddings"])
    again = open_bank(config, retrieval.preprocess, embed, bytes(16), CPU)
    assert sum(seen) == len(fresh), "nothing is embedded twice"
    assert torch.equal(again.embedding(7), fresh.embedding(7))
    with pytest.raises(GeneratorError, match="of another encoder; delete it"):
        open_bank(config, retrieval.preprocess, embed, bytes(15) + b"1", CPU)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(GeneratorError, match="cannot be read"):
        open_bank(config, retrieval.preprocess, embed, bytes(16), CPU)
    lost = BankConfig(images="digits", embeddings=tmp_path / "absent" / "bank.safetensors")
    with pytest.raises(GeneratorError, match="does not exist"):
        open_bank(lost, retrieval.preprocess, embed, bytes(16), CPU)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bank.safetensors"], "nothing half-written"


def test_encoders_that_cannot_be_are_told(tmp_path):
    def problem(encoder):
        with pytest.raises(GeneratorError) as caught:
            open_generator(RetrievalConfig(bank={"images": "digits"}, encoder=encoder), CPU)
        return str(caught.value)

    assert "is not a run directory, encoder.safetensors or generator" in problem(str(tmp_path))
    assert "has random weights" in problem({"name": "resnet18"})
    assert "has random weights" in problem(ResNet18Config())
    for settings, said in [
        ({"bank": {"images": {"name": "digit"}}}, "not one of the datasets"),
        ({"bank": {"images": "digits", "embeddings": "bank.pt"}}, ".safetensors"),
        ({"bank": {"images": {"name": "folder"}}}, "root: field required"),
    ]:
        with pytest.raises(ValidationError, match=said):
            RetrievalConfig(**{"encoder": ENCODER} | settings)


def test_slerp_keeps_to_the_circle_between_two_embeddings():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, generator=random)
    b = 3 * b
    assert torch.allclose(slerp(a, b, 0), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, 1), b, atol=1e-5)
    middle = slerp(a, b, 0.25)
    assert torch.allclose(middle.norm(), 0.75 * a.norm() + 0.25 * b.norm())

    def angle(x, y):
        return torch.arccos(torch.cosine_similarity(x.double(), y.double(), dim=0))

    assert torch.allclose(angle(a, middle), 0.25 * angle(a, b), atol=1e-6)
    assert torch.allclose(angle(a, middle) + angle(middle, b), angle(a, b), atol=1e-6)
    assert torch.isfinite(slerp(a, -a, 0.5)).all()
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a, atol=1e-5)


def test_interpolated_variants_lie_between_source_and_neighbour_and_at_zero_are_the_generators_own(digits_test, unclip):
    block = {"model": "builtin:digits-unclip", "num_inference_steps": 2, "guidance_scale": 1.0}
    config = StableUnCLIPConfig(**block, interpolation={"images": "digits", "amount": [0, 1], "neighbours": 3})
    assert StableUnCLIPConfig.model_validate(config.model_dump(mode="json")) == config
    generator = open_generator(config, CPU)
    assert generator.spec.fingerprint != unclip.spec.fingerprint
    assert generator.spec.defaults["interpolation.max"] == 1
    engine = VariantEngine(generator, [16], deterministic=True)
    plain = VariantEngine(unclip, [16], deterministic=True)
    embeddings, _ = engine.embed([generator.preprocess(digits_test.image(row)) for row in range(8)])

    def made(engine, parameters):
        settings = engine.complete(parameters)
        rows = [engine.row(digits_test.source_id(i), embeddings[i], 0, settings, seed=i) for i in range(8)]
        return rows, engine.generate(rows)[0]

    assert np.array_equal(made(engine, {"interpolation": 0})[1], made(plain, {"noise_level": 0})[1])
    rows, varied = made(engine, {})
    assert len({row.settings.parameters["interpolation"] for row in rows}) == 8
    assert np.array_equal(varied[2:3], engine.generate(rows[2:3])[0]), "whatever the batch"
    assert not np.array_equal(varied, made(engine, {"interpolation": 0})[1])
    with pytest.raises(RequestRefusedError, match=r"interpolation: 1\.5 is outside"):
        engine.complete({"interpolation": 1.5})
