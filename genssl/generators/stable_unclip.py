"""Stable unCLIP: diffusers' own networks under our own sampler.

The stock pipeline takes one noise level and one guidance scale a call, repeats one noised embedding over the variants
of an image, and keeps the text encoder for a prompt that is always empty. Here every row has its own noise level,
guidance and seed, the empty prompt is embedded once, and image embeddings are cached by the caller. For equal seeds and
equal parameters the images are the stock pipeline's (to 1 grey level).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from genssl.data.base import UInt8Array
from genssl.data.decode import resize_and_crop
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Alive, GeneratorSpec, Parameters, keep_living
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.ddim import DDIM
from genssl.generators.fingerprint import fingerprint_folder
from genssl.generators.locate import find_model, read_json

SAMPLER_VERSION = "stable_unclip/1"
PIPELINE = "StableUnCLIPImg2ImgPipeline"
DECODED_PIXELS = 2**22  # of a batch, decoded at once
SETTINGS = ("revision", "dtype", "zero_terminal_snr", "image_size", "output_size")


class StableUnCLIP:
    """A Stable unCLIP model on one device.

    Args:
        config: names the model and gives the default parameters.
        device: where the networks run.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or has no safetensors weights.
    """

    def __init__(self, config: StableUnCLIPConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE)
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._image_encoder, self._preprocessor = image_encoder(folder, self._dtype, device)
        self._unet = _load(UNet2DConditionModel, folder, "unet", self._dtype, device)
        vae_class = read_json(folder / "vae" / "config.json").get("_class_name")
        self._vae = _load(
            AutoencoderTiny if vae_class == "AutoencoderTiny" else AutoencoderKL, folder, "vae", self._dtype, device
        )
        # Embedding arithmetic stays in float32: the normaliser divides by small standard deviations.
        self._normalizer = _load(
            StableUnCLIPImageNormalizer, folder, "image_normalizer", torch.float32, torch.device("cpu")
        )
        self._noising = _from_pretrained(DDPMScheduler, folder, "image_noising_scheduler")
        self._ddim = DDIM(_ddim_scheduler(folder, config.zero_terminal_snr))
        self._text = _empty_prompt(folder, self._dtype, device)
        self._scale = 2 ** (len(self._vae.config["block_out_channels"]) - 1)
        native = int(self._unet.config["sample_size"]) * self._scale
        self._native_size = config.image_size or native
        card = folder / "card.json"
        licence = read_json(card).get("licence") if card.exists() else None
        self.spec = GeneratorSpec(
            name=config.name,
            model=config.model,
            fingerprint=fingerprint_folder(
                folder, SAMPLER_VERSION, config.dtype, f"zero_snr={config.zero_terminal_snr}"
            ),
            embedding_dim=int(self._image_encoder.config.projection_dim),
            image_size=config.output_size or self._native_size,
            licence=licence or "see the model's page (Stable Diffusion 2.1: CreativeML OpenRAIL++-M)",
            settings={name: str(getattr(config, name)) for name in SETTINGS},
            defaults={
                "num_inference_steps": config.num_inference_steps,
                "guidance_scale": config.guidance_scale,
                "noise_level": config.noise_level,
                "image_size": self._native_size,
                "output_size": config.output_size or self._native_size,
            },
        )
        try:
            self.check(self.spec.defaults)
        except RequestRefusedError as error:
            raise GeneratorError(f"generator {config.model}: {error}") from None

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Resizes and centre-crops uint8 [3, H, W] to the image encoder's input size (CLIP's rule; Pillow, bicubic)."""
        return resize_and_crop(image, self._preprocessor["size"])

    @torch.inference_mode()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, embedding_dim], not normalised, on the CPU."""
        mean, std = (torch.tensor(self._preprocessor[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        pixels = (images.float() / 255 - mean) / std
        embeddings: torch.Tensor = self._image_encoder(pixels.to(self._device, self._dtype)).image_embeds
        return embeddings.float().cpu()

    def check(self, parameters: Parameters) -> None:
        """Raises RequestRefusedError for steps, guidance, noise level or sizes outside what the model can do."""
        levels = int(self._noising.config["num_train_timesteps"])
        bounds = {
            "num_inference_steps": (1, 1000),
            "guidance_scale": (0, 100),
            "noise_level": (0, levels - 1),
            "image_size": (self._scale, 2048),
            "output_size": (8, 2048),
        }
        for name, (low, high) in bounds.items():
            if not low <= parameters[name] <= high:
                raise RequestRefusedError(f"parameter {name}: {parameters[name]} is outside {low}..{high}")
        if parameters["image_size"] % self._scale:
            raise RequestRefusedError(
                f"parameter image_size: {parameters['image_size']} is not a multiple of {self._scale}, "
                "the autoencoder's factor"
            )

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """Steps and sizes must agree within a batch, and guided rows go apart since they cost two forwards."""
        guided = parameters["guidance_scale"] > 1
        return (parameters["num_inference_steps"], parameters["image_size"], parameters["output_size"], guided)

    @torch.inference_mode()
    def generate(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        """Makes one image a row; see `Generator.generate`."""
        shared = parameters[0]
        side = int(shared["image_size"]) // self._scale
        channels = int(self._unet.config["in_channels"])
        # The order is the stock pipeline's: the embedding's noise first, then the latents, from one stream a row.
        embedding_noise, latents = [], []
        for seed in seeds:
            stream = torch.Generator("cpu").manual_seed(seed)
            embedding_noise.append(torch.randn((1, embeddings.shape[1]), generator=stream))
            latents.append(torch.randn((1, channels, side, side), generator=stream))
        levels = torch.tensor([int(row["noise_level"]) for row in parameters])
        condition = self.noise_embeddings(embeddings.float(), torch.cat(embedding_noise), levels).to(
            self._device, self._dtype
        )
        x = torch.cat(latents).to(self._device, self._dtype)

        guidance = torch.tensor(
            [float(row["guidance_scale"]) for row in parameters], device=self._device, dtype=self._dtype
        ).view(-1, 1, 1, 1)
        guided = bool(shared["guidance_scale"] > 1)
        rows_left = list(range(len(x)))
        # The hook is asked before the first step too, and once more before decoding, which costs as much as a step.
        for step in [*self._ddim.steps(int(shared["num_inference_steps"])), None]:
            kept = None if alive is None else keep_living(alive(), rows_left, sizes)
            if kept is not None:
                x, condition, guidance = x[kept], condition[kept], guidance[kept]
                rows_left = [rows_left[position] for position in kept]
            if step is not None:
                x = self._ddim.step(step, x, self._predict(x, step.timestep, condition, guidance if guided else None))
        # In slices: at 768 px one image takes over a GB of activations, though the denoiser can take many rows.
        at_once = max(1, DECODED_PIXELS // int(shared["image_size"]) ** 2)
        slices = torch.split(x / self._vae.config["scaling_factor"], at_once)
        decoded = torch.cat([self._vae.decode(part, return_dict=False)[0].float() for part in slices])
        images = (decoded / 2 + 0.5).clamp(0, 1)
        output_size = int(shared["output_size"])
        if output_size != images.shape[-1]:
            images = torch.nn.functional.interpolate(
                images, size=(output_size, output_size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        made = (images * 255).round().to(torch.uint8).cpu()
        if len(made) == len(embeddings):
            return made
        spread = made.new_zeros((len(embeddings), *made.shape[1:]))
        spread[rows_left] = made
        return spread

    def _predict(
        self, x: torch.Tensor, timestep: int, condition: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the network's output [B, C, h, w], guided row by row if `guidance` [B, 1, 1, 1] is given."""
        if guidance is not None:
            x, condition = torch.cat([x, x]), torch.cat([torch.zeros_like(condition), condition])
        text = self._text.expand(len(x), -1, -1)
        output: torch.Tensor = self._unet(
            x, timestep, encoder_hidden_states=text, class_labels=condition, return_dict=False
        )[0]
        if guidance is None:
            return output
        free, conditioned = output.chunk(2)
        return free + guidance * (conditioned - free)

    def noise_embeddings(self, embeddings: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Noises embeddings row by row and appends the sinusoidal embedding of the level.

        Args:
            embeddings, noise: float32 [B, D].
            levels: int64 [B], 0 to the noising schedule's length minus 1.

        Returns:
            float32 [B, 2 D]: what the UNet takes as class labels.
        """
        return noise_embeddings(self._normalizer, self._noising, embeddings, noise, levels)


def noise_embeddings(
    normalizer: StableUnCLIPImageNormalizer,
    noising: DDPMScheduler,
    embeddings: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
) -> torch.Tensor:
    """See `StableUnCLIP.noise_embeddings`; shared with the trainer, so that training and sampling cannot differ."""
    noised = normalizer.unscale(noising.add_noise(normalizer.scale(embeddings), timesteps=levels, noise=noise))
    encoded = get_timestep_embedding(levels, embeddings.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, encoded], dim=1)


def image_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Loads the image encoder of a model's folder alone, and how it wants images: "size" in pixels, "mean", "std".

    Raises:
        GeneratorError: if it is missing, broken, or has no safetensors weights.
    """
    return _load(CLIPVisionModelWithProjection, folder, "image_encoder", dtype, device), _preprocessor(folder)


def _load(kind: Any, folder: Path, subfolder: str, dtype: torch.dtype, device: torch.device) -> Any:
    model = _from_pretrained(kind, folder, subfolder, use_safetensors=True, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def _from_pretrained(kind: Any, folder: Path, subfolder: str, **settings: Any) -> Any:
    try:
        with quiet_libraries():
            return kind.from_pretrained(folder, subfolder=subfolder, local_files_only=True, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        weights = " with safetensors weights" if "use_safetensors" in settings else ""
        raise GeneratorError(
            f"{folder / subfolder}: cannot be loaded as {kind.__name__}{weights}: {error}. "
            "The model folder is incomplete or of another kind"
        ) from None


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


def _ddim_scheduler(folder: Path, zero_terminal_snr: bool) -> DDIMScheduler:
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    # A config without clip_sample would get diffusers' default True, and very different latents.
    # Trailing steps and zero terminal SNR are the paper's sampler (Lin et al. 2024, arXiv 2305.08891).
    config = (
        {"clip_sample": False} | config | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_terminal_snr}
    )
    if zero_terminal_snr and config.get("prediction_type", "epsilon") == "epsilon":
        raise GeneratorError(
            f"{folder}: the model predicts epsilon, which is undefined at zero terminal SNR; "
            "set generator.zero_terminal_snr: false"
        )
    return DDIMScheduler.from_config(config)


def _empty_prompt(folder: Path, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns the hidden states [1, tokens, width] of the empty prompt; text encoder and tokenizer are not kept."""
    tokenizer = _from_pretrained(CLIPTokenizer, folder, "tokenizer")
    encoder = _load(CLIPTextModel, folder, "text_encoder", dtype, device)
    tokens = tokenizer(
        "", padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden_states: torch.Tensor = encoder(tokens.input_ids.to(device))[0]
    return hidden_states


def _preprocessor(folder: Path) -> dict[str, Any]:
    path = folder / "feature_extractor" / "preprocessor_config.json"
    config = read_json(path)
    if "image_mean" not in config or "image_std" not in config:
        raise GeneratorError(f"{path}: has no image_mean or no image_std; the model folder is incomplete, get it again")
    crop = config.get("crop_size", 224)
    return {
        "size": int(crop["height"] if isinstance(crop, dict) else crop),
        "mean": np.asarray(config["image_mean"], dtype=np.float32).tolist(),
        "std": np.asarray(config["image_std"], dtype=np.float32).tolist(),
    }
