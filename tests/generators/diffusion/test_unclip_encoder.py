"""Stable unCLIP sees images with a CLIP, or with genssl's own encoder; the rest of it is the same."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from safetensors.torch import load, save_file
from tiny import build_own_unclip, build_tiny_unclip
from tiny_flow import build_tiny_flow

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators import conditioner
from genssl.generators.conditioner import FILE, Conditioner
from genssl.generators.configs import FlowConfig, RetrievalConfig, StableUnCLIPConfig
from genssl.generators.diffusion import unclip_encoder
from genssl.generators.diffusion.stable_unclip import StableUnCLIP
from genssl.generators.fingerprint import fingerprint_file, fingerprint_folder
from genssl.generators.models import BUILTIN
from genssl.generators.open import open_generator
from genssl.variants import engine as engine_module
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest

CPU = torch.device("cpu")
QUICK = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return build_tiny_unclip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def own(clip) -> Path:
    return build_own_unclip(clip.with_name("own"), clip)


@pytest.fixture
def broken(own, tmp_path) -> Path:
    return Path(shutil.copytree(own, tmp_path / "broken"))


def config_of(folder: Path | str, **settings) -> StableUnCLIPConfig:
    return StableUnCLIPConfig(model=str(folder), **QUICK | settings)


def make(folder: Path | str, **settings) -> StableUnCLIP:
    return StableUnCLIP(config_of(folder, **settings), CPU)


def some_images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def watch_loading(monkeypatch) -> list[str]:
    """Returns a list that grows whenever the weights of an encoder of either kind are read."""
    loaded: list[str] = []

    def watch(module, name: str) -> None:
        read = getattr(module, name)

        def noted(*given):
            loaded.append(name)
            return read(*given)

        monkeypatch.setattr(module, name, noted)

    watch(unclip_encoder, "image_encoder")
    watch(conditioner, "load_encoder")
    return loaded


def test_embeddings_are_the_conditioners(own):
    generator, expected = make(own, dtype="bfloat16"), Conditioner.load(own, CPU)
    image = np.random.default_rng(1).integers(0, 256, (3, 41, 70), dtype=np.uint8)
    assert np.array_equal(generator.preprocess(image), expected.preprocess(image))
    embeddings = generator.embed(some_images())
    assert torch.equal(embeddings, expected.embed(some_images())), "in float32, whatever the denoiser is"
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (3, 32))
    assert generator.spec.embedding_dim == 32
    assert embeddings.norm(dim=1).tolist() == pytest.approx([math.sqrt(32)] * 3, rel=1e-5)


@pytest.mark.parametrize(("guidance", "level"), [(1.0, 100), (4.0, 0)])
def test_images_equal_those_of_the_stock_pipeline_given_the_embeddings(own, clip, guidance, level):
    generator = make(own, num_inference_steps=4, guidance_scale=guidance, noise_level=level)
    embeddings = generator.embed(some_images())
    made = generator.generate(embeddings, [1, 2, 3], [generator.spec.defaults] * 3).numpy()
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(clip)
    pipeline.set_progress_bar_config(disable=True)
    for row in range(3):
        stock = pipeline(
            image_embeds=embeddings[row : row + 1],
            prompt="",
            num_inference_steps=4,
            guidance_scale=guidance,
            noise_level=level,
            generator=torch.Generator("cpu").manual_seed(row + 1),
        ).images[0]
        assert np.abs(made[row].astype(int) - np.asarray(stock).transpose(2, 0, 1)).max() <= 1
    assert len({image.tobytes() for image in made}) == 3


def test_names_follow_from_the_encoders_file(own, clip, tmp_path):
    generator, other = make(own), make(build_own_unclip(tmp_path / "other", clip, seed=1))
    assert generator.conditioner_fingerprint() == fingerprint_file(own / FILE)
    assert generator.conditioner_fingerprint() == make(own, dtype="bfloat16").conditioner_fingerprint()
    assert other.conditioner_fingerprint() != generator.conditioner_fingerprint()
    assert len({one.spec.fingerprint for one in (generator, other, make(clip))}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_of_models_with_a_clip_are_what_they_were_before_there_was_a_choice(dtype):
    folder = BUILTIN / "digits-unclip"
    generator = make("builtin:digits-unclip", dtype=dtype)
    processing = json.dumps({"mean": [0.5] * 3, "size": 8, "std": [0.5] * 3})
    named = fingerprint_folder(folder / "image_encoder", "clip/1", f"torch.{dtype}", processing)
    assert generator.conditioner_fingerprint() == named
    assert generator.spec.fingerprint == fingerprint_folder(folder, "stable_unclip/1", dtype, "zero_snr=True")


@pytest.mark.parametrize("kind", ["clip", "own"])
def test_kept_embeddings_need_no_encoder_and_make_the_same_variants(kind, request, tmp_path, digits_test, monkeypatch):
    folder = request.getfixturevalue(kind)

    def opened() -> InProcessSource:
        generator = open_generator(config_of(folder, embedding_cache=str(tmp_path / "kept")), CPU)
        return InProcessSource(VariantEngine(generator, [4]), digits_test, Ledger())

    def requests(*rows: int) -> list[VariantRequest]:
        return [VariantRequest(row, digits_test.source_id(row), 3) for row in rows]

    made = opened().take(requests(0, 1, 2, 3)).images
    kept = opened()
    loaded = watch_loading(monkeypatch)
    np.testing.assert_array_equal(kept.take(requests(0, 1, 2, 3)).images, made)
    assert loaded == []
    more = kept.take(requests(4)).images
    assert len(loaded) == 1, "the disk does not know this image"
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", -1.0)
    np.testing.assert_array_equal(kept.take(requests(4)).images, more)
    kept.take(requests(5))
    assert len(loaded) == 2, "it was dropped once nothing needed it, and came back"


def test_without_a_folder_for_embeddings_the_encoder_is_loaded_once_and_released_on_demand(own, monkeypatch):
    generator = make(own)
    loaded = watch_loading(monkeypatch)
    before = generator.embed(some_images())
    assert loaded == []
    generator.release_conditioner()
    assert torch.equal(generator.embed(some_images()), before)
    assert loaded == ["load_encoder"]


def test_a_flow_of_the_same_encoder_shares_the_kept_embeddings_and_a_clip_does_not(own, clip, tmp_path):
    flow = build_tiny_flow(tmp_path / "flow")
    shutil.copy(own / FILE, flow / FILE)
    cache = str(tmp_path / "kept")
    first = open_generator(config_of(own, embedding_cache=cache), CPU)
    same = open_generator(FlowConfig(model=str(flow), embedding_cache=cache), CPU)
    assert same.kept_embeddings is first.kept_embeddings  # type: ignore[attr-defined]
    with pytest.raises(GeneratorError, match="holds embeddings of another conditioner"):
        open_generator(config_of(clip, embedding_cache=cache), CPU)


@pytest.mark.parametrize("varying", [{"noise_level": "adaptive"}, {"varying": {"noise_level": "adaptive"}}])
def test_an_adaptive_noise_level_is_refused_where_the_encoder_has_no_patches(own, clip, varying):
    said = (
        r"^generator .*own: stable_unclip: noise_level: adaptive needs a conditioner with a feature map, .* has not; "
    )
    with pytest.raises(GeneratorError, match=said + "give a number or a range$"):
        open_generator(config_of(own, **varying), CPU)
    with pytest.raises(RequestRefusedError, match="adaptive needs a conditioner with a feature map"):
        VariantEngine(make(own), [1]).complete({"noise_level.adaptive": 1})
    assert open_generator(config_of(clip, **varying), CPU).embed_with_foreground(some_images()).shape == (3, 33)  # type: ignore[attr-defined]


def test_ranges_and_the_drift_guard_work_with_either(own, digits_test):
    settings = {"noise_level": [0, 900], "drift_guard": {"min_similarity": 1.0, "max_tries": 2}}
    engine = VariantEngine(open_generator(config_of(own, **settings), CPU), [4])
    source = InProcessSource(engine, digits_test, Ledger())
    made = source.take([VariantRequest(row, digits_test.source_id(row), 0) for row in range(4)]).images
    assert made.shape == (4, 3, 64, 64)
    assert engine.redrawn == 4, "no variant is its source, so each was drawn once more"


def test_an_encoder_of_another_width_is_refused(clip, tmp_path):
    folder = build_own_unclip(tmp_path / "wide", clip, width=8)
    for settings in ({}, {"embedding_cache": str(tmp_path / "kept")}):
        with pytest.raises(GeneratorError, match=r"wide: the image encoder makes 64 numbers an image .* takes 64 inst"):
            make(folder, **settings)


def test_a_folder_with_no_image_encoder_or_two_is_refused(own, clip, broken):
    shutil.copytree(clip / "image_encoder", broken / "image_encoder")
    with pytest.raises(GeneratorError, match=r"broken: holds two image encoders, image_encoder/ and encoder.safetens"):
        make(broken)
    shutil.rmtree(broken / "image_encoder")
    make(broken)
    (broken / FILE).unlink()
    with pytest.raises(GeneratorError, match=r"broken: holds no image encoder, neither image_encoder/ nor encoder.saf"):
        make(broken)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_encoder_that_is_broken_or_of_another_format_is_named(broken, tmp_path, lazy):
    settings = {"embedding_cache": str(tmp_path / "kept")} if lazy else {}
    path = broken / FILE
    whole = path.read_bytes()
    tensors = load(whole)  # from memory: the file that they would be mapped to is written anew
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GeneratorError, match=r"encoder.safetensors: cannot be read as safetensors"):
        make(broken, **settings)
    save_file(tensors, path, {"format": "another/1"})
    with pytest.raises(GeneratorError, match=r"is not an encoder of genssl \(format 'another/1'"):
        make(broken, **settings)
    save_file(tensors, path, {"format": "genssl-encoder/1", "backbone": '{"name": "resnet18", "stem": "small"}'})
    with pytest.raises(GeneratorError, match="the backbone cannot be rebuilt"):
        make(broken, **settings)
    block = '{"name": "resnet18", "stem": "small", "width": 4}'
    save_file(tensors, path, {"format": "genssl-encoder/1", "backbone": block})
    with pytest.raises(GeneratorError, match="does not say its image size"):
        make(broken, **settings)


def test_retrieval_finds_neighbours_by_it(own):
    generator = open_generator(RetrievalConfig(bank={"images": "digits"}, encoder=str(own)), CPU)
    assert torch.equal(generator.embed(some_images()), Conditioner.load(own, CPU).embed(some_images()))
