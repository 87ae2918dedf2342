"""Our sampler against diffusers' stock pipeline, and what makes a row independent of its neighbours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableUnCLIPImg2ImgPipeline
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import build_tiny_unclip

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Cancelled
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.diffusion.stable_unclip import StableUnCLIP
from genssl.generators.models import BUILTIN, find_model

CPU = torch.device("cpu")
SEEDS = [3, 2**40 + 1, 77]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny_unclip(tmp_path_factory.mktemp("models") / "tiny")


def make(folder: Path | str, **settings) -> StableUnCLIP:
    return StableUnCLIP(StableUnCLIPConfig(model=str(folder), **settings), CPU)


def stock_pipeline(folder: Path) -> StableUnCLIPImg2ImgPipeline:
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock_images(
    folder: Path, images: np.ndarray, seeds: list[int], *, steps: int, guidance: float, level: int
) -> np.ndarray:
    """Returns uint8 [B, 3, h, w] of diffusers' own pipeline, called one image at a time."""
    pipeline, made = stock_pipeline(folder), []
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


def test_latents_equal_the_stock_pipelines_alone_and_in_a_mixed_batch(tiny):
    """Rows of different noise levels and guidance, sampled together, against one call of the pipeline for each."""
    generator = make(tiny, num_inference_steps=5, guidance_scale=2.0)
    images = np.random.default_rng(5).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    embeddings = generator.embed(torch.from_numpy(images))
    rows = [(0, 2.0, 21), (700, 9.5, 22), (250, 4.0, 23), (999, 1.5, 24)]
    parameters = [
        {**generator.spec.defaults, "noise_level": level, "guidance_scale": guidance} for level, guidance, _ in rows
    ]
    seeds = [seed for _, _, seed in rows]
    together, order = generator.sample(embeddings, seeds, parameters)
    assert order == [0, 1, 2, 3]
    pipeline = stock_pipeline(tiny)
    for i, (level, guidance, seed) in enumerate(rows):
        expected = pipeline(
            image_embeds=embeddings[i : i + 1],
            prompt="",
            num_inference_steps=5,
            guidance_scale=guidance,
            noise_level=level,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        ).images
        alone, _ = generator.sample(embeddings[i : i + 1], [seed], parameters[i : i + 1])
        assert float((alone - expected).abs().max()) <= 1e-4
        assert float((together[i : i + 1] - expected).abs().max()) <= 1e-4


def test_guidance_lasts_for_its_interval_and_costs_a_second_forward_there_alone(tiny, monkeypatch):
    images = np.random.default_rng(6).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    settings = {"num_inference_steps": 4, "guidance_scale": 6.0, "noise_level": 100}
    whole = ours(make(tiny, **settings), images, [1, 2])
    none = ours(make(tiny, **settings | {"guidance_scale": 1.0}), images, [1, 2])
    generator = make(tiny, **settings, guidance_start=0.25, guidance_end=0.75)
    sizes: list[int] = []
    generator._unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    middle = ours(generator, images, [1, 2])
    assert sizes == [2, 4, 4, 2]
    assert grey_levels_apart(middle, whole) > 1
    assert grey_levels_apart(middle, none) > 1
    assert grey_levels_apart(ours(make(tiny, **settings, guidance_end=0.0), images, [1, 2]), none) <= 1
    keys = {
        generator.batch_key({**generator.spec.defaults, "guidance_end": end, "guidance_scale": scale})
        for end in (0.75, 1.0)
        for scale in (3.0, 9.0)
    }
    assert len(keys) == 1, "guided rows share a batch, whatever their guidance and its interval"


def test_rows_of_all_guidance_intervals_share_a_batch(tiny):
    generator = make(tiny, num_inference_steps=5, guidance_scale=4.0)
    images = np.random.default_rng(8).integers(0, 256, (5, 3, 32, 32), dtype=np.uint8)
    embeddings, seeds = generator.embed(torch.from_numpy(images)), [31, 32, 33, 34, 35]
    intervals = [(0.0, 1.0), (0.1, 0.6), (0.4, 1.0), (0.79, 0.81), (0.0, 0.2)]
    rows = [
        {**generator.spec.defaults, "guidance_start": start, "guidance_end": end, "guidance_scale": 2.0 + start}
        for start, end in intervals
    ]
    assert len({generator.batch_key(row) for row in rows}) == 1
    sizes: list[int] = []
    generator._unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    together, _ = generator.sample(embeddings, seeds, rows)
    # Guided at each step: rows 0 and 4; 0 and 1; 0, 1 and 2; 0 and 2; 0, 2 and 3. Three are padded to four.
    assert sizes == [5 + 2, 5 + 2, 5 + 4, 5 + 2, 5 + 4], "a row that is not guided takes part in one forward"
    for i, row in enumerate(rows):
        alone, _ = generator.sample(embeddings[i : i + 1], seeds[i : i + 1], [row])
        assert float((together[i : i + 1] - alone).abs().max()) <= 1e-4

    exactly, _ = generator.sample(embeddings, seeds, rows, exact=True)
    for i, row in enumerate(rows):
        same, _ = generator.sample(embeddings, seeds, [row] * 5, exact=True)
        assert torch.equal(exactly[i], same[i]), "bits depend on no row beside it"


@pytest.mark.parametrize("exact", [False, True])
def test_rows_of_one_interval_have_the_calls_and_so_the_bits_of_before(tiny, exact):
    generator = make(tiny, num_inference_steps=4, guidance_start=0.25, guidance_end=0.75)
    sizes: list[int] = []
    generator._unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    embeddings = torch.zeros(3, generator.spec.embedding_dim)
    generator.sample(embeddings, SEEDS, [generator.spec.defaults] * 3, exact=exact)
    assert sizes == [3, 6, 6, 3]


def test_a_batch_of_mixed_intervals_shrinks_to_the_rows_still_wanted(tiny):
    generator = make(tiny, num_inference_steps=4)
    embeddings = generator.embed(torch.from_numpy(np.full((3, 3, 32, 32), 77, dtype=np.uint8)))
    rows = [{**generator.spec.defaults, "guidance_start": start} for start in (0.0, 0.5, 0.75)]
    asked = []

    def alive() -> list[bool]:
        asked.append(None)
        return [len(asked) < 2, False, True]

    images = generator.generate(embeddings, SEEDS, rows, alive=alive, sizes=[1])
    alone = generator.generate(embeddings[2:], SEEDS[2:], rows[2:])
    assert grey_levels_apart(images[2:].numpy(), alone.numpy()) <= 1


def test_a_compiled_network_sees_two_sizes_however_many_rows_are_guided(tiny, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: None)
    compiled, plain = make(tiny, compile=True, num_inference_steps=4), make(tiny, num_inference_steps=4)
    sizes: list[int] = []
    compiled._unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    embeddings = torch.zeros(3, plain.spec.embedding_dim)
    rows = [{**plain.spec.defaults, "guidance_start": start} for start in (0.25, 0.5, 0.75)]
    latents, _ = compiled.sample(embeddings, SEEDS, rows)
    assert sizes == [3, 6, 6, 6]
    assert float((latents - plain.sample(embeddings, SEEDS, rows)[0]).abs().max()) <= 1e-4


@pytest.mark.parametrize("count", [61, 103])
def test_counts_at_which_diffusers_rounds_to_one_step_more_make_images(tiny, count):
    generator = make(tiny, num_inference_steps=count, guidance_scale=1.0)
    sizes: list[int] = []
    generator._unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    generator.sample(torch.zeros(1, generator.spec.embedding_dim), [1], [generator.spec.defaults])
    assert len(sizes) == count


def test_a_tiny_decoder_takes_the_place_of_the_models_own(tiny, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
            tmp_path / "taesd"
        )
        AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "other")
    generator = make(tiny, num_inference_steps=2, tiny_vae=str(tmp_path / "taesd"))
    images = np.random.default_rng(7).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    latents, _ = generator.sample(generator.embed(torch.from_numpy(images)), [1, 2], [generator.spec.defaults] * 2)
    decoder = AutoencoderTiny.from_pretrained(tmp_path / "taesd")
    expected = (decoder.decode(latents).sample.detach() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().numpy()
    assert grey_levels_apart(ours(generator, images, [1, 2]), expected) <= 1
    assert generator.spec.fingerprint != make(tiny, num_inference_steps=2).spec.fingerprint
    with pytest.raises(GeneratorError, match=r"tiny_vae: .*other has 16 latent channels and 4 levels, .* 4 and 4"):
        make(tiny, tiny_vae=str(tmp_path / "other"))
    with pytest.raises(GeneratorError, match="the model is a AutoencoderKL; this generator needs a AutoencoderTiny"):
        make(tiny, tiny_vae=str(tiny / "vae"))
    with pytest.raises(GeneratorError, match=r"generator.tiny_vae: './nowhere' is neither a folder here nor a hub id"):
        make(tiny, tiny_vae="./nowhere")


def test_presets_give_what_the_block_does_not():
    paper = StableUnCLIPConfig(preset="unclip-paper")  # type: ignore[call-arg]
    assert (paper.model, paper.image_size, paper.output_size) == (
        "sd2-community/stable-diffusion-2-1-unclip-small",
        768,
        224,
    )
    assert (paper.num_inference_steps, paper.guidance_scale, paper.noise_level) == (10, 10.0, 0)
    own = StableUnCLIPConfig(preset="unclip", model="here", num_inference_steps=4)
    assert (own.model, own.num_inference_steps, own.output_size) == ("here", 4, 512)
    assert StableUnCLIPConfig.model_validate(own.model_dump()) == own, "a resolved recipe says the same again"
    with pytest.raises(ValidationError, match="model"):
        StableUnCLIPConfig()  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match=r"guidance_end is 0.2, before guidance_start 0.5"):
        StableUnCLIPConfig(model="here", guidance_start=0.5, guidance_end=0.2)


def test_a_number_that_overflows_is_reported_and_no_black_image(tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_in.weight"] *= 1e38
    save_file(weights, broken / "vae" / "diffusion_pytorch_model.safetensors")
    generator = make(broken, num_inference_steps=1, guidance_scale=1.0, dtype="bfloat16")
    with pytest.raises(GeneratorError, match=r"infinite numbers. bfloat16 overflowed \(set generator.dtype to"):
        ours(generator, np.zeros((1, 3, 32, 32), np.uint8), [0])


def test_a_compiled_network_is_compiled_once_a_batch_size_and_not_once_a_step(tiny, monkeypatch):
    graphs: list[int] = []

    def count(graph, inputs):
        graphs.append(len(inputs))
        return graph.forward

    compiled = torch.compile  # without code generation, which takes a minute: what is traced when is the question here
    monkeypatch.setattr(torch, "compile", lambda call, **settings: compiled(call, backend=count, **settings))
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0}
    images = np.random.default_rng(8).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    made = ours(make(tiny, compile=True, **settings), images, [1, 2])
    assert len(graphs) == 2, "one of the denoiser and one of the decoder"
    assert grey_levels_apart(made, ours(make(tiny, **settings), images, [1, 2])) <= 1


def test_the_cost_of_a_variant_counts_its_forward_passes(tiny):
    def cost(**settings) -> float:
        return make(tiny, **settings).spec.tflops

    decoding = 2 * cost(num_inference_steps=1, guidance_scale=1.0) - cost(num_inference_steps=2, guidance_scale=1.0)
    step = cost(num_inference_steps=1, guidance_scale=1.0) - decoding
    assert decoding > 0
    assert step > 0
    assert cost(num_inference_steps=4, guidance_scale=3.0) == pytest.approx(decoding + 8 * step)
    assert cost(num_inference_steps=4, guidance_scale=3.0, guidance_end=0.5) == pytest.approx(decoding + 6 * step)
