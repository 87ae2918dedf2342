"""FLUX.2 klein against diffusers' stock pipeline, and rows that do not see each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.diffusion.configs import Flux2KleinConfig
from genssl.generators.diffusion.flux2_klein import Flux2Klein

CPU = torch.device("cpu")
SEEDS = [3, 2**40 + 1, 77]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    symbols = [*ByteLevel.alphabet(), "<|endoftext|>"]
    tokenizer = Qwen2TokenizerFast(vocab={symbol: i for i, symbol in enumerate(sorted(symbols))}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}.{% endfor %}"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=AutoencoderKLFlux2(
                block_out_channels=(4, 4, 4, 4),
                layers_per_block=1,
                latent_channels=1,
                norm_num_groups=1,
                sample_size=64,
            ),
            text_encoder=Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=len(symbols),
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=27,
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=8,
                )
            ),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=48,
                timestep_guidance_channels=32,
                axes_dims_rope=[4, 4, 4, 4],
                guidance_embeds=False,
            ),
        )
        # Attention is faint at the first weights; here the reference shall matter, or mixed rows would not be seen.
        for name, parameter in pipeline.transformer.named_parameters():
            if "attn" in name and parameter.ndim == 2:
                parameter.data *= 4
        pipeline.vae.bn.running_mean.normal_(0, 0.3)
        pipeline.vae.bn.running_var.uniform_(0.5, 2.0)
        pipeline.save_pretrained(folder)
    return folder


def make(folder: Path, **settings) -> Flux2Klein:
    given = {"model": str(folder), "reference_size": 64, "image_size": 64, "prompt": "a cat", "prompt_tokens": 16}
    return Flux2Klein(Flux2KleinConfig(**given | settings), CPU)


@pytest.mark.parametrize("guidances", [[1.0, 1.0, 1.0], [2.0, 4.0, 1.5]])
def test_images_equal_the_stock_pipelines_alone_and_in_mixed_batches(tiny, guidances):
    pipeline = Flux2KleinPipeline.from_pretrained(tiny)
    pipeline.set_progress_bar_config(disable=True)
    generator = make(tiny)
    embeddings = generator.embed(torch.from_numpy(IMAGES))
    parameters = [{**generator.spec.defaults, "guidance_scale": guidance} for guidance in guidances]
    together, _ = generator.sample(embeddings, SEEDS, parameters)
    images = generator.generate(embeddings, SEEDS, parameters)
    assert images.shape == (3, 3, 64, 64)
    for row in range(3):
        one = slice(row, row + 1)

        def stock(output_type: str, row: int = row):
            return pipeline(
                image=Image.fromarray(IMAGES[row].transpose(1, 2, 0)),
                prompt="a cat",
                height=64,
                width=64,
                num_inference_steps=4,
                guidance_scale=guidances[row],
                generator=torch.Generator("cpu").manual_seed(SEEDS[row]),
                max_sequence_length=16,
                output_type=output_type,
            ).images

        unpacked = torch.nn.functional.pixel_shuffle(together[one] * generator._std + generator._mean, 2)
        expected = stock("latent")
        assert expected.std() > 0.1
        assert (unpacked - expected).abs().max() <= 1e-4
        alone, _ = generator.sample(embeddings[one], SEEDS[one], parameters[one])
        assert (alone - together[one]).abs().max() <= 1e-4
    picture = np.asarray(stock("pil")[0]).transpose(2, 0, 1).astype(int)
    assert np.abs(images[2].numpy().astype(int) - picture).max() <= 1
    other, _ = generator.sample(embeddings[[1]], SEEDS[:1], parameters[:1])
    assert (other[0] - together[0]).abs().max() > 1e-2, "the reference image does not matter"


def test_what_does_not_fit_is_refused_with_a_sentence(tiny, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    distilled = make(copy)
    with pytest.raises(RequestRefusedError, match="the model is distilled"):
        distilled.check({**distilled.spec.defaults, "guidance_scale": 2.0})
    with pytest.raises(RequestRefusedError, match="not a multiple of 16"):
        distilled.check({**distilled.spec.defaults, "image_size": 72})
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(GeneratorError, match="safetensors"):
        make(copy)
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(GeneratorError, match="is a FluxPipeline; this generator needs a Flux2KleinPipeline"):
        make(copy)


def test_the_cost_is_what_a_variant_computes(tiny):
    """Counted while one is really made; the spec's count follows shapes alone, before any is."""
    for settings in ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}):
        made = make(tiny, **settings)
        embedding = torch.zeros((1, made.spec.embedding_dim))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            made.generate(embedding, [1], [made.spec.defaults])
        assert made.spec.tflops == pytest.approx(counter.get_total_flops() / 1e12, rel=1e-6)
        assert made.spec.tflops > 0


def test_an_ordinary_folder_is_named_as_when_every_file_counted(tiny):
    spec = make(tiny).spec
    assert spec.fingerprint == spec.former()
