"""Loads the parts of a diffusers folder: safetensors only, nothing downloaded, and every failure in one sentence.

The one constant prompt of a Stable Diffusion model is embedded at load time; the text encoders are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from genssl.base import safetensors_file
from genssl.errors import GeneratorError
from genssl.generators.fingerprint import Fact, find_weights, fingerprint_model, network_files, tokenizer_files
from genssl.generators.finite import check_weights
from genssl.generators.models import DIFFUSERS, find_network, read_json
from genssl.generators.preprocessing import Preprocessing, Rule, read_preprocessing


def load_network(kind: Any, folder: Path, subfolder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads one network of a pipeline, frozen and in evaluation mode; `*.fp16.safetensors` where there is no other.

    Raises:
        GeneratorError: if it is missing, of another kind or shape, or has no finite safetensors weights.
    """
    _, variant = find_weights(folder / subfolder)
    chosen = {"variant": variant} if variant else {}
    model = load_part(kind, folder, subfolder, use_safetensors=True, dtype=dtype, **chosen).to(device)
    check_weights(folder / subfolder, model.state_dict())
    return model.eval().requires_grad_(False)


def load_part(kind: Any, folder: Path, subfolder: str, **settings: Any) -> Any:
    """Loads a scheduler, tokenizer or network by its `from_pretrained`; raises GeneratorError if that fails."""
    try:
        with quiet_libraries():
            return kind.from_pretrained(folder, subfolder=subfolder, local_files_only=True, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        weights = " with safetensors weights" if "use_safetensors" in settings else ""
        raise GeneratorError(
            f"{folder / subfolder}: cannot be loaded as {kind.__name__}{weights}: {error}. "
            "The model folder is incomplete or of another kind"
        ) from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file on the CPU; raises GeneratorError if it is broken or not finite."""
    try:
        tensors = safetensors_file.read_tensors(path)[0]
    except (OSError, SafetensorError) as error:
        raise GeneratorError(f"{path}: cannot be read as safetensors ({error}); get it again") from None
    check_weights(path, tensors)
    return tensors


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads the autoencoder of a Stable Diffusion folder, full or tiny, as its config names it."""
    tiny = read_json(folder / "vae" / "config.json").get("_class_name") == "AutoencoderTiny"
    return load_network(AutoencoderTiny if tiny else AutoencoderKL, folder, "vae", dtype, device)


def load_decoder(folder: Path, tiny: str | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, list[Fact]]:
    """Loads what decodes latents: the folder's own autoencoder, or a tiny one of a folder or hub id in its place.

    Returns the autoencoder, and what a generator's name owes to it beside its own folder.
    """
    if tiny is None:
        return load_vae(folder, dtype, device), []
    own = read_json(folder / "vae" / "config.json")
    part = find_network(tiny, "AutoencoderTiny", "generator.tiny_vae")
    vae = load_network(AutoencoderTiny, part, "", dtype, device)
    wanted = own.get("latent_channels", 4), len(own["block_out_channels"])
    found = vae.config["latent_channels"], len(vae.config["block_out_channels"])
    if found != wanted:
        raise GeneratorError(
            f"generator.tiny_vae: {tiny} has {found[0]} latent channels and {found[1]} levels, and the model's "
            f"decoder {wanted[0]} and {wanted[1]}; take one that was made for it"
        )
    return vae, [("tiny_vae=", fingerprint_model(part, network_files(part)))]


def image_encoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    processor: str = "feature_extractor",
    rule: Rule | None = None,
) -> tuple[Any, Preprocessing]:
    """Loads the image encoder of a model's folder alone, and how it wants images; see `read_preprocessing`."""
    preprocessing = read_preprocessing(folder, processor, rule)
    return load_network(CLIPVisionModelWithProjection, folder, "image_encoder", dtype, device), preprocessing


def factor_of(vae: Any) -> int:
    """Returns how many pixels of an autoencoder's images a latent has at each side."""
    return int(2 ** (len(vae.config["block_out_channels"]) - 1))


def pipeline_files(folder: Path, networks: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Returns what is loaded of a pipeline's folder, relative to it: `networks` have weights, `others` have none."""
    files = [DIFFUSERS]
    for part in networks:
        files += network_files(folder, part)
    for part in others:
        files += tokenizer_files(part) if part.startswith("tokenizer") else []
        files += [f"{part}/scheduler_config.json", f"{part}/preprocessor_config.json"]
    return files


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, diffusers and transformers draw no progress bars of their own and give no advice on what to install."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


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
