"""Stable Diffusion pipelines with IP-Adapters, of random weights in the published layouts."""

from __future__ import annotations

from pathlib import Path

import tiny_parts
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from genssl.generators.diffusion.configs import IPAdapterConfig
from genssl.generators.diffusion.ip_adapter import IPAdapter

CPU = torch.device("cpu")


def adapter_tensors(unet, plus: bool) -> dict[str, torch.Tensor]:
    """Returns random weights in the layout of the published adapters."""
    width = unet.config["cross_attention_dim"]
    tensors = {}
    for number, (name, processor) in enumerate(unet.attn_processors.items()):
        if "attn2" in name:
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            assert processor is not None
            for kind in "kv":
                tensors[f"ip_adapter.{number}.to_{kind}_ip.weight"] = torch.randn(out, width) / width**0.5
    if not plus:
        return tensors | {
            "image_proj.proj.weight": torch.randn(4 * width, 32),
            "image_proj.proj.bias": torch.randn(4 * width),
            "image_proj.norm.weight": torch.ones(width),
            "image_proj.norm.bias": torch.zeros(width),
        }
    projection = {
        "latents": torch.randn(1, 4, 64),
        "proj_in.weight": torch.randn(64, 32) / 6,
        "proj_in.bias": torch.zeros(64),
        "proj_out.weight": torch.randn(width, 64) / 8,
        "proj_out.bias": torch.zeros(width),
        "norm_out.weight": torch.ones(width),
        "norm_out.bias": torch.zeros(width),
    }
    for layer in range(4):
        projection |= {
            f"layers.{layer}.0.norm{n}.{part}": torch.ones(64) if part == "weight" else torch.zeros(64)
            for n in (1, 2)
            for part in ("weight", "bias")
        }
        projection |= {
            f"layers.{layer}.0.to_q.weight": torch.randn(64, 64) / 8,
            f"layers.{layer}.0.to_kv.weight": torch.randn(128, 64) / 8,
            f"layers.{layer}.0.to_out.weight": torch.randn(64, 64) / 8,
            f"layers.{layer}.1.0.weight": torch.ones(64),
            f"layers.{layer}.1.0.bias": torch.zeros(64),
            f"layers.{layer}.1.1.weight": torch.randn(256, 64) / 8,
            f"layers.{layer}.1.3.weight": torch.randn(64, 256) / 16,
        }
    return tensors | {f"image_proj.{key}": tensor for key, tensor in projection.items()}


def write_models(root: Path) -> Path:
    """Writes folders sd, xl and encoder; adapters sd.safetensors, sd_plus.safetensors and xl.safetensors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, text = tiny_parts.tokenizer(root / "tokens")
        sd = StableDiffusionPipeline(
            vae=tiny_parts.vae(),
            unet=tiny_parts.unet(),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            scheduler=tiny_parts.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        xl = StableDiffusionXLPipeline(
            vae=tiny_parts.vae(),
            unet=tiny_parts.unet(
                cross_attention_dim=64,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 32,
            ),
            text_encoder=CLIPTextModel(text),
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=tiny_parts.scheduler(),
        )
        sd.save_pretrained(root / "sd")
        xl.save_pretrained(root / "xl")
        tiny_parts.vision_encoder().save_pretrained(root / "encoder")
        for name, unet, plus in [("sd", sd.unet, False), ("sd_plus", sd.unet, True), ("xl", xl.unet, False)]:
            save_file(adapter_tensors(unet, plus), root / f"{name}.safetensors")
    return root


def make(root: Path, adapter: str = "sd", **settings) -> IPAdapter:
    given = {
        "model": str(root / adapter.removesuffix("_plus")),
        "adapter": str(root / f"{adapter}.safetensors"),
        "image_encoder": str(root / "encoder"),
        "num_inference_steps": 3,
        "prompt": "best quality",
    }
    return IPAdapter(IPAdapterConfig(**given | settings), CPU)
