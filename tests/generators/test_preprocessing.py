"""Sources of any shape reach an image encoder as in the stock pipelines, held to transformers and torchvision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from PIL import Image
from scipy.ndimage import gaussian_filter
from tiny import build_own_unclip, build_tiny_unclip
from torchvision.transforms import functional
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from genssl.errors import GeneratorError
from genssl.generators.configs import RetrievalConfig, StableUnCLIPConfig
from genssl.generators.diffusion.ip_adapter import IPAdapter
from genssl.generators.diffusion.stable_unclip import StableUnCLIP
from genssl.generators.fingerprint import fingerprint_folder
from genssl.generators.open import open_generator
from genssl.generators.preprocessing import crop_then_resize, read_preprocessing, resize_then_crop
from genssl.generators.retrieval.generator import Retrieval

CPU = torch.device("cpu")
SIZES = [(500, 375), (500, 333), (481, 321), (1600, 1067)]
SHAPES = [*SIZES, *((height, width) for width, height in SIZES), (224, 224), (300, 300), (225, 224), (33, 71)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return build_tiny_unclip(tmp_path_factory.mktemp("models") / "clip")


def photo(width: int, height: int, blur: float = 0.0) -> np.ndarray:
    """Noise, the worst case; or blurred, which is more like a photo."""
    pixels = np.random.default_rng(width).integers(0, 256, (3, height, width), dtype=np.uint8)
    if not blur:
        return pixels
    smooth = gaussian_filter(pixels.astype(float), (0, blur, blur))
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min()) * 255).astype(np.uint8)


def opened(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.transpose(1, 2, 0))


def stock(pixels: np.ndarray, **settings) -> np.ndarray:
    """Returns uint8 [3, S, S] by transformers' processor, as int."""
    processor = CLIPImageProcessor(**settings)
    made = processor(opened(pixels), do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
    return made.astype(int)


@pytest.mark.parametrize("blur", [0.0, 2.0])
@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_a_clip_sees_what_transformers_shows_it(width, height, blur):
    pixels = photo(width, height, blur)
    assert np.abs(resize_then_crop(pixels, 224, 224) - stock(pixels)).max() <= 1


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        (256, {"shortest_edge": 256}),
        ((240, 230), {"height": 240, "width": 230}),
        ((224, 224), {"height": 224, "width": 224}),
    ],
)
def test_sizes_other_than_the_crops_are_followed(resize, size):
    pixels = photo(481, 321)
    assert np.abs(resize_then_crop(pixels, resize, 224) - stock(pixels, size=size)).max() <= 1


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_the_papers_rule_is_its_scripts(width, height):
    pixels = photo(width, height)
    # CenterCropLongEdge, then torchvision's Resize.
    expected = functional.resize(functional.center_crop(opened(pixels), min(width, height)), [224, 224])
    np.testing.assert_array_equal(crop_then_resize(pixels, 224), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(3, 1, 3_000_000), (3, 3_000_000, 1)])
def test_a_strip_does_not_grow_with_its_short_side(shape):
    assert resize_then_crop(np.full(shape, 7, np.uint8), 224, 224).shape == (3, 224, 224)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_embeddings_and_images_of_photos_are_the_stock_pipelines(clip, width, height):
    generator = StableUnCLIP(StableUnCLIPConfig(model=str(clip), num_inference_steps=2, guidance_scale=4.0), CPU)
    pixels = photo(width, height, 2.0)
    embedding = generator.embed(torch.from_numpy(generator.preprocess(pixels))[None])
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(clip)
    pipeline.set_progress_bar_config(disable=True)
    shown = pipeline.feature_extractor(images=opened(pixels), return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = pipeline.image_encoder(shown).image_embeds
    assert (embedding - expected).abs().max() < 2e-3
    made = generator.generate(embedding, [5], [generator.spec.defaults])[0].numpy().astype(int)
    image = pipeline(
        opened(pixels), num_inference_steps=2, guidance_scale=4.0, generator=torch.Generator("cpu").manual_seed(5)
    ).images[0]
    assert np.abs(made - np.asarray(image).transpose(2, 0, 1)).max() <= 2


def test_an_ip_adapters_encoder_sees_what_the_stock_pipeline_shows_it(tmp_path):
    """The stock pipeline makes a CLIPImageProcessor of the encoder's size, since no repository holds a config."""
    from tiny_ip_adapter import make, write_models

    generator = make(write_models(tmp_path))
    assert isinstance(generator, IPAdapter)
    pixels = photo(481, 321)
    assert np.abs(generator.preprocess(pixels) - stock(pixels, size=32, crop_size=32)).max() <= 1
    encoder = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "encoder")
    shown = CLIPImageProcessor(size=32, crop_size=32)(opened(pixels), return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = encoder(shown).image_embeds
    made = generator.embed(torch.from_numpy(generator.preprocess(pixels))[None])
    assert (made - expected).abs().max() < 2e-2


def named(folder: Path, known: tuple[str, ...] = (), **settings) -> str:
    config = StableUnCLIPConfig(model=str(folder), num_inference_steps=1, **settings)
    return open_generator(config, CPU, known).spec.fingerprint.hex()


def test_the_rule_is_part_of_the_name_and_the_former_name_goes_with_the_former_rule_alone(clip):
    former = fingerprint_folder(clip, "stable_unclip/1", "float32", "zero_snr=True").hex()
    names = {rule: named(clip, preprocess=rule) for rule in ("clip", "paper", "square")}
    assert names["square"] == former
    assert len(set(names.values())) == 3
    assert named(clip) == names["clip"]
    assert named(clip, (former,)) == names["clip"], "other variants of sources that are no squares"


def test_a_model_that_genssl_trained_keeps_the_rule_that_it_was_trained_with(clip, tmp_path):
    own = Path(shutil.copytree(clip, tmp_path / "own"))
    (own / "card.json").write_text(json.dumps({"trained_by": "genssl 0.1.0, torch 2.11"}))
    assert named(own) == named(clip, preprocess="square") == named(own, preprocess="square")
    assert named(own, preprocess="clip") == named(clip)
    assert read_preprocessing(own).rule == "square"


def test_kept_embeddings_of_another_rule_are_not_taken(clip, tmp_path):
    kept = {"embedding_cache": str(tmp_path / "kept")}
    open_generator(StableUnCLIPConfig(model=str(clip), preprocess="square", **kept), CPU)
    open_generator(StableUnCLIPConfig(model=str(clip), preprocess="square", **kept), CPU)
    with pytest.raises(GeneratorError, match="kept"):
        open_generator(StableUnCLIPConfig(model=str(clip), **kept), CPU)


def test_retrieval_by_a_clip_shows_it_the_same(clip):
    block = {"bank": {"images": "digits"}, "encoder": str(clip)}
    pixels = photo(481, 321)
    shown = Retrieval(RetrievalConfig(**block), CPU).preprocess(pixels)
    assert np.abs(shown - stock(pixels, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})).max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop is False, which is not done here; allowed: true"),
        ({"do_resize": False}, "do_resize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, .*allowed: 1/255"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size is .*allowed: a number"),
        ({"size": {"shortest_edge": 16}}, "crop_size is .*a square of at most 16 pixels"),
        ({"crop_size": {"height": 32, "width": 24}}, "crop_size is"),
        ({"resample": 17}, r"resample is 17, .*3 \(BICUBIC\)"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(clip, tmp_path, change, message):
    (tmp_path / "feature_extractor").mkdir()
    file = "feature_extractor/preprocessor_config.json"
    config = json.loads((clip / file).read_text())
    (tmp_path / file).write_text(json.dumps(config | change))
    with pytest.raises(GeneratorError, match=message):
        read_preprocessing(tmp_path)


def test_an_encoder_of_genssl_has_no_rule(clip, tmp_path):
    own = build_own_unclip(tmp_path / "own", clip)
    assert named(own) == named(own, preset="unclip-paper", preprocess=None, dtype="float32", image_size=None)
    with pytest.raises(GeneratorError, match=r"generator.preprocess: .* not with a CLIP; leave preprocess out"):
        named(own, preset="unclip-paper")
