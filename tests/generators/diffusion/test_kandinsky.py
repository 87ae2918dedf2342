"""Kandinsky 2.2's decoder against diffusers' stock pipeline, and rows that do not see each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_parts
import torch
from diffusers import DDIMScheduler, KandinskyV22Pipeline, VQModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPImageProcessor

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Cancelled
from genssl.generators.diffusion.configs import KandinskyConfig
from genssl.generators.diffusion.kandinsky import Kandinsky

CPU = torch.device("cpu")
SEEDS = [3, 2**40 + 1, 77]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders decoder and prior, the latter with its image encoder alone."""
    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_parts.unet(
            sample_size=16,
            out_channels=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            addition_embed_type="image",
            encoder_hid_dim=32,
            encoder_hid_dim_type="image_proj",
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
            class_embed_type=None,
        )
        movq = VQModel(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        )
        scheduler = DDIMScheduler(
            beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        )
        KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq).save_pretrained(root / "decoder")
        prior = root / "prior"
        tiny_parts.vision_encoder().save_pretrained(prior / "image_encoder")
        tiny_parts.image_processor().save_pretrained(prior / "image_processor")
        (prior / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyV22PriorPipeline"}))
    return root


def make(root: Path, **settings) -> Kandinsky:
    given = {"model": str(root / "decoder"), "prior": str(root / "prior"), "num_inference_steps": 4}
    return Kandinsky(KandinskyConfig(**given | settings), CPU)


@pytest.fixture(scope="module")
def generator(models) -> Kandinsky:
    return make(models)


@pytest.fixture(scope="module")
def embeddings(generator) -> torch.Tensor:
    return generator.embed(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)))


@pytest.mark.parametrize("guidances", [[1.0, 1.0, 1.0], [4.0, 7.5, 1.5]])
def test_latents_equal_the_stock_pipelines_alone_and_in_mixed_batches(models, generator, embeddings, guidances):
    pipeline = KandinskyV22Pipeline.from_pretrained(models / "decoder")
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        blank = generator._encoder.network()(torch.zeros(1, 3, 32, 32)).image_embeds

    def stock(row: int, output_type: str):
        return pipeline(
            image_embeds=embeddings[row : row + 1],
            negative_image_embeds=blank,
            height=32,
            width=32,
            num_inference_steps=4,
            guidance_scale=guidances[row],
            generator=torch.Generator("cpu").manual_seed(SEEDS[row]),
            output_type=output_type,
        ).images

    parameters = [{**generator.spec.defaults, "guidance_scale": guidance} for guidance in guidances]
    together, _ = generator.sample(embeddings, SEEDS, parameters)
    images = generator.generate(embeddings, SEEDS, parameters)
    assert images.shape == (3, 3, 32, 32)
    for row in range(3):
        one = slice(row, row + 1)
        expected = stock(row, "latent")
        assert expected.std() > 0.1
        assert (together[one] - expected).abs().max() <= 1e-4
        alone, _ = generator.sample(embeddings[one], SEEDS[one], parameters[one])
        assert (alone - expected).abs().max() <= 1e-4
    picture = np.asarray(stock(0, "pil")[0]).transpose(2, 0, 1).astype(int)
    assert np.abs(images[0].numpy().astype(int) - picture).max() <= 1


def test_guidance_one_costs_one_forward_and_a_batch_shrinks(generator, embeddings):
    computed = []
    hook = generator._unet.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    for guidance in (1.0, 4.0):
        parameters = [{**generator.spec.defaults, "guidance_scale": guidance}] * 3
        whole = generator.generate(embeddings, SEEDS, parameters)
        alive = iter([[True] * 3, [False, True, False], *[[False, True, False]] * 3])
        shrunk = generator.generate(embeddings, SEEDS, parameters, alive=lambda alive=alive: next(alive), sizes=[1])
        assert (shrunk[1].int() - whole[1].int()).abs().max() <= 1
    hook.remove()
    assert computed == [3] * 4 + [3, 1, 1, 1] + [6] * 4 + [6, 2, 2, 2]
    with pytest.raises(Cancelled):
        generator.generate(embeddings, SEEDS, parameters, alive=lambda: [False] * 3)


def test_what_does_not_fit_is_refused_with_a_sentence(models, tmp_path, generator):
    with pytest.raises(RequestRefusedError, match="not a multiple of 4"):
        generator.check({**generator.spec.defaults, "image_size": 30})
    with pytest.raises(GeneratorError, match=r"generator\.prior: './nowhere' is neither a folder"):
        make(models, prior="./nowhere")
    with pytest.raises(GeneratorError, match="is a KandinskyV22Pipeline; this generator needs a KandinskyV22Prior"):
        make(models, prior=str(models / "decoder"))
    copy = tmp_path / "prior"
    shutil.copytree(models / "prior", copy)
    tiny_parts.vision_encoder(projection_dim=16).save_pretrained(copy / "image_encoder")
    with pytest.raises(GeneratorError, match=r"takes embeddings of 32 numbers, and generator\.prior"):
        make(models, prior=str(copy))
    weights = copy / "image_encoder" / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(GeneratorError, match="safetensors"):
        make(models, prior=str(copy))


def test_the_cost_is_what_a_variant_computes(models):
    """Counted while one is really made; the spec's count follows shapes alone, before any is."""
    for settings in ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}):
        made = make(models, **settings)
        embedding = torch.zeros((1, made.spec.embedding_dim))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            made.generate(embedding, [1], [made.spec.defaults])
        assert made.spec.tflops == pytest.approx(counter.get_total_flops() / 1e12, rel=1e-6)
        assert made.spec.tflops > 0


def test_an_ordinary_folder_is_named_as_when_every_file_counted(generator):
    spec = generator.spec
    assert spec.fingerprint == spec.former()


def test_a_photo_is_shown_to_the_encoder_as_the_priors_pipeline_does(models, generator):
    pixels = np.random.default_rng(2).integers(0, 256, (3, 321, 481), dtype=np.uint8)
    processor = CLIPImageProcessor.from_pretrained(models / "prior" / "image_processor")
    stock = processor(torch.from_numpy(pixels), do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    assert np.abs(generator.preprocess(pixels) - stock[0].astype(int)).max() <= 1
    square = make(models, preprocess="square")
    assert square.spec.fingerprint != generator.spec.fingerprint
    assert np.abs(square.preprocess(pixels) - stock[0].astype(int)).max() > 5
