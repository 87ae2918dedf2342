"""Embeds the one constant prompt of a Stable Diffusion model at load time; the text encoders are not kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genssl.generators.diffusion.loading import load_network, load_part
from genssl.generators.models import DIFFUSERS, read_json


@dataclass(frozen=True)
class Prompt:
    """What the denoiser is told by text.

    Attributes:
        tokens: [1, 77, width] of the prompt.
        pooled: [1, width] of the prompt, for SDXL; of width 0 for Stable Diffusion 1 and 2.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor


@torch.inference_mode()
def embed_prompts(folder: Path, prompts: list[str], xl: bool, dtype: torch.dtype, device: torch.device) -> list[Prompt]:
    """Embeds prompts as Stable Diffusion's pipelines do: SDXL takes the last layer but one of two encoders."""
    tokens: list[list[torch.Tensor]] = [[] for _ in prompts]
    pooled = [torch.zeros((1, 0)) for _ in prompts]
    for suffix in ["", "_2"] if xl else [""]:
        tokenizer = load_part(CLIPTokenizer, folder, f"tokenizer{suffix}")
        kind = CLIPTextModelWithProjection if suffix else CLIPTextModel
        encoder = load_network(kind, folder, f"text_encoder{suffix}", dtype, device)
        for row, prompt in enumerate(prompts):
            ids = tokenizer(
                prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(device)
            encoded = encoder(ids, output_hidden_states=xl)
            tokens[row].append(encoded.hidden_states[-2] if xl else encoded[0])
            if suffix:
                pooled[row] = encoded[0]
    return [Prompt(torch.cat(parts, dim=-1), pool) for parts, pool in zip(tokens, pooled, strict=True)]


def embed_prompt_and_empty(
    folder: Path, prompt: str, xl: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Prompt, Prompt]:
    """Returns the prompt and what guidance compares it with: the empty prompt, or zeros where an SDXL model says so."""
    given, empty = embed_prompts(folder, [prompt, ""], xl, dtype, device)
    if xl and bool(read_json(folder / DIFFUSERS).get("force_zeros_for_empty_prompt", True)):
        empty = Prompt(torch.zeros_like(given.tokens), torch.zeros_like(given.pooled))
    return given, empty
