"""Image variations against diffusers' stock pipeline, and rows that do not see each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_parts
import torch
from diffusers import StableDiffusionImageVariationPipeline
from PIL import Image
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPImageProcessor

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Cancelled
from genssl.generators.diffusion.configs import ImageVariationConfig
from genssl.generators.diffusion.image_variation import ImageVariation
from genssl.generators.fingerprint import fingerprint_folder
from genssl.training.progress import RunProgress
from genssl.training.run import run

CPU = torch.device("cpu")
SEEDS = [3, 2**40 + 1, 77]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        StableDiffusionImageVariationPipeline(
            vae=tiny_parts.vae(),
            image_encoder=tiny_parts.vision_encoder(),
            unet=tiny_parts.unet(),
            scheduler=tiny_parts.scheduler(),
            safety_checker=None,
            feature_extractor=tiny_parts.image_processor(),
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def make(folder: Path, **settings) -> ImageVariation:
    return ImageVariation(ImageVariationConfig(model=str(folder), **settings), CPU)


@pytest.fixture(scope="module")
def generator(tiny) -> ImageVariation:
    return make(tiny, num_inference_steps=4)


@pytest.fixture(scope="module")
def embeddings(generator) -> torch.Tensor:
    return generator.embed(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)))


def stock(folder: Path, guidances: list[float], steps: int) -> torch.Tensor:
    """Returns latents [B, 4, 8, 8] of diffusers' own pipeline, called one image at a time."""
    pipeline = StableDiffusionImageVariationPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    processor = pipeline.feature_extractor
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (processor.image_mean, processor.image_std))
    return torch.cat(
        [
            pipeline(
                image=((torch.from_numpy(image) / 255 - mean) / std)[None],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
            ).images
            for image, guidance, seed in zip(images, guidances, SEEDS, strict=True)
        ]
    )


@pytest.mark.parametrize("guidances", [[1.0, 1.0, 1.0], [3.0, 7.5, 1.5]])
def test_latents_equal_the_stock_pipelines_alone_and_in_mixed_batches(tiny, generator, embeddings, guidances):
    expected = stock(tiny, guidances, 4)
    assert expected.std() > 0.1, "the stock pipeline made nothing to compare with"
    parameters = [{**generator.spec.defaults, "guidance_scale": guidance} for guidance in guidances]
    together, _ = generator.sample(embeddings, SEEDS, parameters)
    alone, _ = generator.sample(embeddings[1:2], SEEDS[1:2], parameters[1:2])
    assert (together - expected).abs().max() <= 1e-4
    assert (alone - expected[1:2]).abs().max() <= 1e-4
    images = generator.generate(embeddings, SEEDS, parameters)
    assert images.shape == (3, 3, 64, 64)
    assert (images[1:2].int() - generator.generate(embeddings[1:2], SEEDS[1:2], parameters[1:2]).int()).abs().max() <= 1


def test_guidance_one_costs_one_forward_and_a_batch_shrinks(generator, embeddings):
    computed = []
    hook = generator._unet.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    for guidance in (1.0, 3.0):
        parameters = [{**generator.spec.defaults, "guidance_scale": guidance}] * 3
        wanted = iter([{0, 1, 2}, {1}, {1}, {1}, {1}])

        def alive(wanted=wanted) -> list[bool]:
            rows = next(wanted)
            return [row in rows for row in range(3)]

        whole = generator.generate(embeddings, SEEDS, parameters)
        shrunk = generator.generate(embeddings, SEEDS, parameters, alive=alive, sizes=[1])
        assert (shrunk[1].int() - whole[1].int()).abs().max() <= 1
    hook.remove()
    assert computed == [3] * 4 + [3, 1, 1, 1] + [6] * 4 + [6, 2, 2, 2]
    with pytest.raises(Cancelled):
        generator.generate(embeddings, SEEDS, parameters, alive=lambda: [False] * 3)


def test_preprocessing_follows_the_card_or_clip(tiny, generator):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    image = np.random.default_rng(1).integers(0, 256, (3, 50, 70), dtype=np.uint8)
    card = resize(torch.from_numpy(image) / 255, [32, 32], InterpolationMode.BICUBIC, antialias=False)
    assert np.abs(generator.preprocess(image) / 255 - card.clamp(0, 1).numpy()).max() <= 0.51 / 255
    clip = make(tiny, preprocess="clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    stock = processor(torch.from_numpy(image), do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    assert np.abs(clip.preprocess(image) - stock[0].astype(int)).max() <= 1
    square = make(tiny, preprocess="square")
    assert len({one.spec.fingerprint for one in (generator, clip, square)}) == 3
    facts = ("float32", "spacing=None", "preprocess=clip")  # as the square rule was called
    assert square.spec.fingerprint == fingerprint_folder(tiny, "image_variation/1", *facts)


def test_what_does_not_fit_is_refused_with_a_sentence(tiny, tmp_path, generator):
    with pytest.raises(RequestRefusedError, match="not a multiple of 8"):
        generator.check({**generator.spec.defaults, "image_size": 60})
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    tiny_parts.unet(cross_attention_dim=16).save_pretrained(copy / "unet")
    with pytest.raises(GeneratorError, match="embedding has 32 numbers, but the UNet's cross-attention takes 16"):
        make(copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(GeneratorError, match="safetensors"):
        make(copy)
    index = copy / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(GeneratorError, match="is a StableDiffusionPipeline; this generator needs"):
        make(copy)


def test_a_recipe_can_name_it(tiny, tmp_path):
    block = f"generator={{name: image_variation, model: {tiny}, num_inference_steps: 1, output_size: 8}}"
    quick = ["train.epochs=1", "schedule.warmup_epochs=0", "backbone.width=4", "train.threads=1", "evaluate=[]"]
    for row in range(16):
        photo = tmp_path / "photos" / "ab"[row % 2] / f"{row}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(row).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(photo)
    dataset = f"dataset={{name: folder, root: {tmp_path / 'photos'}, image_size: 8}}"
    small = [dataset, "variants.source=in_process", "train.batch_size=8"]
    recipe = load(Recipe, ROOT / "recipes" / "simclr_sd.yaml", [block, *quick, *small])
    with (tmp_path / "out.txt").open("w") as text, RunProgress(Console(file=text)) as progress:
        run(recipe, tmp_path / "run", progress)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["ledger"]["variants_generated"] == 8
    assert (tmp_path / "run" / "samples.png").is_file()


def test_the_cost_is_what_a_variant_computes(tiny):
    """Counted while one is really made; the spec's count follows shapes alone, before any is."""
    for settings in ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}):
        made = make(tiny, num_inference_steps=2, **settings)
        embedding = torch.zeros((1, made.spec.embedding_dim))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            made.generate(embedding, [1], [made.spec.defaults])
        assert made.spec.tflops == pytest.approx(counter.get_total_flops() / 1e12, rel=1e-6)
        assert made.spec.tflops > 0


def test_an_ordinary_folder_is_named_as_when_every_file_counted(generator):
    spec = generator.spec
    assert spec.fingerprint == spec.former()
