"""Our sampler against diffusers' stock pipeline, and what makes a row independent of its neighbours."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from PIL import Image

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Cancelled
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.locate import BUILTIN, find_model
from genssl.generators.stable_unclip import StableUnCLIP

sys.path.insert(0, str(Path(__file__).parent))
from tiny import build_tiny_unclip

CPU = torch.device("cpu")
SEEDS = [3, 2**40 + 1, 77]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny_unclip(tmp_path_factory.mktemp("models") / "tiny")


def make(folder: Path | str, **settings) -> StableUnCLIP:
    return StableUnCLIP(StableUnCLIPConfig(model=str(folder), **settings), CPU)


def stock_images(
    folder: Path, images: np.ndarray, seeds: list[int], *, steps: int, guidance: float, level: int
) -> np.ndarray:
    """Returns uint8 [B, 3, h, w] of diffusers' own pipeline, called one image at a time."""
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for image, seed in zip(images, seeds, strict=True):
        result = pipeline(
            image=Image.fromarray(image.transpose(1, 2, 0)),
            prompt="",
            num_inference_steps=steps,
            guidance_scale=guidance,
            noise_level=level,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pil",
        )
        made.append(np.asarray(result.images[0]).transpose(2, 0, 1))
    return np.stack(made)


def ours(generator: StableUnCLIP, images: np.ndarray, seeds: list[int]) -> np.ndarray:
    embeddings = generator.embed(torch.from_numpy(np.stack([generator.preprocess(image) for image in images])))
    return generator.generate(embeddings, seeds, [generator.spec.defaults] * len(seeds)).numpy()


def grey_levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(("steps", "guidance", "level"), [(4, 1.0, 400), (10, 10.0, 0), (3, 4.0, 250)])
def test_builtin_images_equal_the_stock_pipelines(digits_test, steps, guidance, level):
    images = np.stack([digits_test.image(row) for row in range(len(SEEDS))])
    generator = make("builtin:digits-unclip", num_inference_steps=steps, guidance_scale=guidance, noise_level=level)
    stock = stock_images(BUILTIN / "digits-unclip", images, SEEDS, steps=steps, guidance=guidance, level=level)
    assert stock.std() > 30, "the stock pipeline made no picture to compare with"
    assert grey_levels_apart(ours(generator, images, SEEDS), stock) <= 1


@pytest.mark.parametrize(("steps", "guidance", "level"), [(2, 1.0, 100), (5, 3.0, 0), (7, 10.0, 999)])
def test_images_with_cross_attention_equal_the_stock_pipelines(tiny, steps, guidance, level):
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    generator = make(tiny, num_inference_steps=steps, guidance_scale=guidance, noise_level=level)
    stock = stock_images(tiny, images, SEEDS, steps=steps, guidance=guidance, level=level)
    assert grey_levels_apart(ours(generator, images, SEEDS), stock) <= 1


def test_epsilon_prediction_equals_the_stock_pipelines(tmp_path):
    folder = build_tiny_unclip(tmp_path / "epsilon", prediction_type="epsilon")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    with pytest.raises(GeneratorError, match="zero terminal SNR"):
        make(folder, num_inference_steps=4)
    # Without zero-SNR betas the first step has a signal to divide by, and the two agree.
    config = json.loads(scheduler.read_text()) | {"rescale_betas_zero_snr": False}
    scheduler.write_text(json.dumps(config))
    generator = make(folder, num_inference_steps=4, guidance_scale=2.0, zero_terminal_snr=False)
    stock = stock_images(folder, images, SEEDS[:2], steps=4, guidance=2.0, level=0)
    assert grey_levels_apart(ours(generator, images, SEEDS[:2]), stock) <= 1


def test_rows_with_their_own_parameters_do_not_see_each_other(tiny):
    generator = make(tiny, num_inference_steps=4, guidance_scale=3.0)
    images = np.random.default_rng(2).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    embeddings = generator.embed(torch.from_numpy(images))
    parameters = [
        {**generator.spec.defaults, "noise_level": level, "guidance_scale": guidance}
        for level, guidance in [(0, 2.0), (100, 3.0), (500, 9.0), (999, 4.0), (20, 1.5)]
    ]
    seeds = [11, 12, 13, 14, 15]
    together = generator.generate(embeddings, seeds, parameters).numpy()
    alone = np.concatenate(
        [generator.generate(embeddings[i : i + 1], seeds[i : i + 1], parameters[i : i + 1]).numpy() for i in range(5)]
    )
    assert grey_levels_apart(together, alone) <= 1
    assert len({image.tobytes() for image in together}) == 5


def test_a_row_is_bit_equal_at_an_equal_batch_size(unclip, digits_test):
    embeddings = unclip.embed(torch.from_numpy(np.stack([digits_test.image(row) for row in range(8)])))
    parameters = [unclip.spec.defaults] * 8
    first = unclip.generate(embeddings, list(range(8)), parameters)
    other_neighbours = unclip.generate(embeddings[[0, *range(7)]], [0, *range(100, 107)], parameters)
    assert torch.equal(first[0], other_neighbours[0])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_shrinks_step_by_step_to_the_rows_still_wanted(tiny, guidance):
    generator = make(tiny, num_inference_steps=4, guidance_scale=guidance)
    images = np.random.default_rng(3).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    embeddings = generator.embed(torch.from_numpy(images))
    parameters = [{**generator.spec.defaults, "noise_level": 30 * row} for row in range(8)]
    whole = generator.generate(embeddings, list(range(8)), parameters).numpy()
    wanted = iter([range(8), {1, 2, 5}, {2, 5}, {5}, {5}])
    computed = []
    hook = generator._unet.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))

    def alive() -> list[bool]:
        rows = next(wanted)
        return [row in rows for row in range(8)]

    made = generator.generate(embeddings, list(range(8)), parameters, alive=alive, sizes=[1, 4]).numpy()
    hook.remove()
    assert computed == [size * (2 if guidance > 1 else 1) for size in (8, 4, 4, 1)]
    assert grey_levels_apart(made[5], whole[5]) <= 1
    assert not made[[0, 3, 4, 6, 7]].any()


def test_without_sizes_a_batch_only_stops_when_no_row_is_wanted(tiny):
    generator = make(tiny, num_inference_steps=3, guidance_scale=1.0)
    embeddings = torch.zeros(4, 32)
    parameters = [generator.spec.defaults] * 4
    whole = generator.generate(embeddings, [*SEEDS, 5], parameters)
    half = generator.generate(embeddings, [*SEEDS, 5], parameters, alive=lambda: [True, False, False, False])
    assert torch.equal(half[0], whole[0])
    asked = []

    def until_the_third_step() -> list[bool]:
        asked.append(None)
        return [len(asked) < 3] * 4

    with pytest.raises(Cancelled):
        generator.generate(embeddings, [*SEEDS, 5], parameters, alive=until_the_third_step)
    assert len(asked) == 3


def test_generation_leaves_the_global_random_stream_alone(unclip, digits_test):
    embeddings = unclip.embed(torch.from_numpy(digits_test.image(0)[None]))
    before = torch.random.get_rng_state()
    unclip.generate(embeddings, [1], [unclip.spec.defaults])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_noise_level_zero_without_guidance_differs_from_noise_level_high(unclip, digits_test):
    embeddings = unclip.embed(torch.from_numpy(digits_test.image(0)[None])).repeat(16, 1)

    def spread(level: int) -> float:
        parameters = [{**unclip.spec.defaults, "noise_level": level}] * 16
        return float(unclip.generate(embeddings, list(range(16)), parameters).float().std(dim=0).mean())

    assert spread(600) > 2 * spread(0)


def test_output_size_shrinks_the_image(tiny):
    generator = make(tiny, num_inference_steps=2, guidance_scale=1.0, output_size=24)
    image = ours(generator, np.zeros((1, 3, 40, 50), np.uint8), [0])
    assert image.shape == (1, 3, 24, 24)
    assert generator.spec.image_size == 24


def test_preprocessing_takes_any_size(tiny):
    generator = make(tiny)
    assert generator.preprocess(np.zeros((3, 33, 71), np.uint8)).shape == (3, 32, 32)


def test_fingerprint_names_weights_dtype_and_config_but_not_the_card(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    (copy / "README.md").write_text("words")
    original = make(tiny).spec.fingerprint
    assert make(copy).spec.fingerprint == original
    assert make(tiny, dtype="bfloat16").spec.fingerprint != original
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert make(copy).spec.fingerprint != original


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("noise_level", 1000, "noise_level: 1000 is outside 0..999"),
        ("num_inference_steps", 0, "num_inference_steps: 0 is outside"),
        ("image_size", 60, "not a multiple of 8"),
        ("guidance_scale", float("nan"), "guidance_scale: nan is outside"),
    ],
)
def test_impossible_parameters_are_refused(tiny, name, value, message):
    generator = make(tiny)
    with pytest.raises(RequestRefusedError, match=message):
        generator.check({**generator.spec.defaults, name: value})


def test_a_model_that_is_not_there_says_what_was_looked_for():
    with pytest.raises(GeneratorError, match="no built-in model 'digit-unclip'; did you mean 'digits-unclip'"):
        find_model("builtin:digit-unclip", None, "StableUnCLIPImg2ImgPipeline")
    with pytest.raises(GeneratorError, match=r"neither a folder here, nor builtin:NAME, nor a hub id"):
        find_model("./nowhere", None, "StableUnCLIPImg2ImgPipeline")


def test_a_hub_model_that_cannot_be_had_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GeneratorError, match=r"hf download nobody/nothing --local-dir DIR"):
        find_model("nobody/nothing", None, "StableUnCLIPImg2ImgPipeline")


def test_a_folder_of_another_pipeline_is_refused(tiny, tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(tiny, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(GeneratorError, match="the model is a StableDiffusionPipeline"):
        make(copy)


def test_weights_that_are_not_safetensors_are_refused(tiny, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(tiny, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(GeneratorError, match="safetensors"):
        make(copy)
