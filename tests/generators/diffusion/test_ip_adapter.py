"""IP-Adapter rows against one-by-one results and the stock pipelines, of which one pins the mixing that we avoid."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_parts
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, TCDScheduler
from safetensors.torch import save_file
from tiny_ip_adapter import make, write_models
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.diffusion.configs import IPAdapterConfig
from genssl.generators.diffusion.few_step import fuse_lora
from genssl.generators.diffusion.ip_adapter import MEAN, STD, IPAdapter
from genssl.generators.diffusion.loading import read_tensors
from genssl.generators.models import find_file, find_part

CPU = torch.device("cpu")
SEEDS = [3, 2**40 + 1, 77]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def stock(root: Path, adapter: str, guidance: float, rows: list[int], scheduler=None, **more) -> torch.Tensor:
    """Returns latents of diffusers' own pipeline for all `rows` in one call."""
    kind = StableDiffusionXLPipeline if adapter == "xl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(root / adapter.removesuffix("_plus"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet._load_ip_adapter_weights(
        [
            {
                part: {
                    key.removeprefix(f"{part}."): tensor
                    for key, tensor in read_tensors(root / f"{adapter}.safetensors").items()
                    if key.startswith(f"{part}.")
                }
                for part in ("image_proj", "ip_adapter")
            }
        ],
        low_cpu_mem_usage=False,
    )
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    encoder = tiny_parts.vision_encoder().from_pretrained(root / "encoder")
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    pixels = (torch.from_numpy(IMAGES[rows]) / 255 - mean) / std

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            if adapter.endswith("_plus"):
                return encoder(pixels, output_hidden_states=True).hidden_states[-2][:, None]
            return encoder(pixels).image_embeds[:, None]

    embeds = encode(pixels)
    if guidance > 1:
        plus = adapter.endswith("_plus")
        blank = encode(torch.zeros_like(pixels)) if plus else torch.zeros_like(embeds)
        embeds = torch.cat([blank, embeds])
    return pipeline(
        prompt=["best quality"] * len(rows),
        ip_adapter_image_embeds=[embeds],
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(SEEDS[row]) for row in rows],
        output_type="latent",
        **more,
    ).images


def ours(generator: IPAdapter, guidances: list[float], rows: list[int]) -> torch.Tensor:
    embeddings = generator.embed(torch.from_numpy(IMAGES[rows]))
    parameters = [{**generator.spec.defaults, "guidance_scale": guidance} for guidance in guidances]
    return generator.sample(embeddings, [SEEDS[row] for row in rows], parameters)[0]


@pytest.mark.parametrize("adapter", ["sd", "sd_plus", "xl"])
def test_rows_equal_one_by_one_results_and_the_stock_pipeline_at_batch_one(models, adapter):
    generator = make(models, adapter)
    guidances = [2.0, 5.0, 7.5]
    together = ours(generator, guidances, [0, 1, 2])
    for row, guidance in enumerate(guidances):
        assert (ours(generator, [guidance], [row]) - together[row]).abs().max() <= 1e-4
        expected = stock(models, adapter, guidance, [row])
        assert expected.std() > 0.1
        assert (together[row] - expected[0]).abs().max() <= 1e-4
    unguided = ours(generator, [1.0] * 3, [0, 1, 2])
    assert (unguided[:1] - stock(models, adapter, 1.0, [0])).abs().max() <= 1e-4
    # The image matters, so that a row with another's image would be seen.
    swapped = generator.embed(torch.from_numpy(IMAGES[[1]]))
    other = generator.sample(swapped, SEEDS[:1], [{**generator.spec.defaults, "guidance_scale": 2.0}])[0]
    assert (other[0] - together[0]).abs().max() > 1e-2


def test_the_stock_pipeline_mixes_the_images_of_a_batch(models):
    """Diffusers' issue 9813. If this fails the stock pipeline was repaired: say so in ip_adapter.py."""
    alone = torch.cat([stock(models, "sd", 1.0, [row]) for row in range(2)])
    together = stock(models, "sd", 1.0, [0, 1])
    assert (together - alone).abs().max() > 1e-2


@pytest.mark.parametrize(("sampler", "scheduler"), [("lcm", LCMScheduler), ("tcd", TCDScheduler)])
def test_few_step_samplers_equal_the_stock_schedulers_and_shrink(models, sampler, scheduler):
    generator = make(models, sampler=sampler, guidance_scale=1.0, gamma=0.3)
    together = ours(generator, [1.0] * 3, [0, 1, 2])
    for row in range(3):
        expected = stock(models, "sd", 1.0, [row], scheduler, eta=0.3)  # TCD's gamma; LCM has none
        assert (together[row] - expected[0]).abs().max() <= 1e-4
    embeddings = generator.embed(torch.from_numpy(IMAGES))
    wanted = iter([{0, 1, 2}, {1, 2}, {2}, {2}])

    def alive() -> list[bool]:
        rows = next(wanted)
        return [row in rows for row in range(3)]

    latents, rows = generator.sample(embeddings, SEEDS, [generator.spec.defaults] * 3, alive=alive, sizes=[1, 2])
    assert rows == [2]
    assert (latents[0] - together[2]).abs().max() <= 1e-4


def test_a_lora_is_fused_in_every_layout(models, tmp_path):
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"]
    unet = make(models)._unet
    layers = [unet.get_submodule(name) for name in names]
    before = [layer.weight.clone() for layer in layers]
    torch_stream = torch.Generator().manual_seed(0)
    query = [torch.randn(shape, generator=torch_stream) for shape in [(2, before[0].shape[1]), (before[0].shape[0], 2)]]
    convolution = [
        torch.randn(shape, generator=torch_stream)
        for shape in [(2, *before[1].shape[1:]), (before[1].shape[0], 2, 1, 1)]
    ]
    changes = [query[1] @ query[0], torch.einsum("or,rihw->oihw", convolution[1][..., 0, 0], convolution[0])]
    kohya, peft = {}, {}
    for name, (down, up) in zip(names, [query, convolution], strict=True):
        flat = "lora_unet_" + name.replace(".", "_")
        kohya |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(1.0)}
        peft |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    for tensors, factor in [(kohya, 0.5), (peft, 1.0)]:
        fuse_lora(unet, tmp_path / "lora", tensors, 1.0)
        for layer, start, change in zip(layers, before, changes, strict=True):
            assert torch.allclose(layer.weight, start + factor * change, atol=1e-5)
            layer.weight.data = start.clone()
    old = "unet." + names[0].replace(".to_q", ".processor.to_q_lora")
    fuse_lora(unet, tmp_path / "lora", {f"{old}.down.weight": query[0], f"{old}.up.weight": query[1]}, 1.0)
    assert torch.allclose(layers[0].weight, before[0] + changes[0], atol=1e-5)
    layers[0].weight.data = before[0].clone()
    save_file(kohya, tmp_path / "lora.safetensors")
    tuned = make(models, lora=str(tmp_path / "lora.safetensors"))
    assert tuned.spec.fingerprint != make(models).spec.fingerprint
    assert (ours(tuned, [1.0], [0]) - ours(make(models), [1.0], [0])).abs().max() > 1e-3
    with pytest.raises(GeneratorError, match="the UNet has no such layer"):
        fuse_lora(unet, tmp_path / "lora", {"unet.nowhere.to_q.lora_A.weight": query[0]}, 1.0)
    with pytest.raises(GeneratorError, match="does not fit the layer's"):
        fuse_lora(unet, tmp_path / "lora", peft | {f"unet.{names[0]}.lora_A.weight": query[0][:, :5]}, 1.0)
    with pytest.raises(GeneratorError, match="holds no LoRA"):
        fuse_lora(unet, tmp_path / "lora", {"weight": query[0]}, 1.0)


def test_what_does_not_fit_is_refused_with_a_sentence(models, tmp_path):
    with pytest.raises(GeneratorError, match=r"generator.adapter: 'x.bin' is not a .safetensors file"):
        IPAdapter(
            IPAdapterConfig(model=str(models / "sd"), adapter="x.bin", image_encoder=str(models / "encoder")), CPU
        )
    with pytest.raises(GeneratorError, match="does not fit this model's UNet"):
        IPAdapter(
            IPAdapterConfig(
                model=str(models / "sd"), adapter=str(models / "xl.safetensors"), image_encoder=str(models / "encoder")
            ),
            CPU,
        )
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(GeneratorError, match="cannot be read as safetensors"):
        read_tensors(tmp_path / "broken.safetensors")
    save_file({"image_proj.norm.weight": torch.ones(1)}, tmp_path / "face.safetensors")
    with pytest.raises(GeneratorError, match="neither a base nor a plus IP-Adapter"):
        IPAdapter(
            IPAdapterConfig(
                model=str(models / "sd"),
                adapter=str(tmp_path / "face.safetensors"),
                image_encoder=str(models / "encoder"),
            ),
            CPU,
        )
    other = tmp_path / "other"
    shutil.copytree(models / "sd", other)
    (other / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyV22Pipeline"}))
    with pytest.raises(GeneratorError, match="StableDiffusionPipeline or a StableDiffusionXLPipeline"):
        make(models, model=str(other))
    generator = make(models)
    with pytest.raises(RequestRefusedError, match="adapter_scale: 11"):
        generator.check({**generator.spec.defaults, "adapter_scale": 11})


def test_parts_that_are_not_there_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(GeneratorError, match=r"generator\.adapter: './a.safetensors' is neither a file here nor OWNER"):
        find_file("./a.safetensors", "generator.adapter")
    with pytest.raises(GeneratorError, match=r"hf download nobody/nothing .* generator\.adapter: DIR/b/c\.safetensors"):
        find_file("nobody/nothing@main/b/c.safetensors", "generator.adapter")
    with pytest.raises(GeneratorError, match=r"set generator\.image_encoder: DIR/models/image_encoder"):
        find_part("nobody/nothing/models/image_encoder", "generator.image_encoder")


def test_the_cost_is_what_a_variant_computes(models):
    """Counted while one is really made; the spec's count follows shapes alone, before any is."""
    for settings in ({"guidance_scale": 1.0}, {"guidance_scale": 3.0}):
        made = make(models, **settings)
        embedding = torch.zeros((1, made.spec.embedding_dim))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            made.generate(embedding, [1], [made.spec.defaults])
        assert made.spec.tflops == pytest.approx(counter.get_total_flops() / 1e12, rel=1e-6)
        assert made.spec.tflops > 0


def test_an_ordinary_folder_is_named_as_when_every_file_counted(models):
    spec = make(models, "xl").spec
    assert spec.fingerprint == spec.former()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_all_adapter_scales_share_a_batch_and_keep_their_bits(models, guidance, dtype):
    generator = make(models, guidance_scale=guidance, dtype=dtype)
    embeddings = generator.embed(torch.from_numpy(IMAGES))
    rows = [{**generator.spec.defaults, "adapter_scale": scale} for scale in (0.0, 0.55, 1.3)]
    assert len({generator.batch_key(row) for row in rows}) == 1
    mixed, _ = generator.sample(embeddings, SEEDS, rows)
    for i, row in enumerate(rows):
        same, _ = generator.sample(embeddings, SEEDS, [row] * 3)
        assert torch.equal(mixed[i], same[i])
    assert not torch.allclose(mixed[1], generator.sample(embeddings, SEEDS, rows[::-1])[0][0], atol=0.1)
