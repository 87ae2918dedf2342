"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721) on Stable Diffusion 1.5 or SDXL: an image where the prompt would be.

The stock pipeline mixes the images of a batch (diffusers' issue 9813): it repeats the embeddings of all rows for every
row, and attention reads them as if they belonged together. Here every row attends to its own image, so that rows equal
one-by-one results; one row alone equals the stock pipeline's. The prompt is one constant, embedded at load.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionModelWithProjection

from genssl.errors import GeneratorError
from genssl.generators.diffusion.configs import IPAdapterConfig
from genssl.generators.diffusion.few_step import LCM, TCD, fuse_lora
from genssl.generators.diffusion.guided import Columns, GuidedDiffusion
from genssl.generators.diffusion.loading import (
    embed_prompt_and_empty,
    factor_of,
    load_network,
    load_vae,
    pipeline_files,
    quiet_libraries,
    read_tensors,
)
from genssl.generators.diffusion.sampling import Sampler, read_ddim
from genssl.generators.fingerprint import Fact, fingerprint_file, fingerprint_model, network_files
from genssl.generators.finite import check_weights
from genssl.generators.models import DIFFUSERS, find_file, find_model, find_part, licence_of, read_json
from genssl.generators.preprocessing import Preprocessing

SAMPLER_VERSION = "ip_adapter/1"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
# CLIP's own, with which all IP-Adapters were trained; their repositories hold no preprocessor config.
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class RowScales:
    """Weights of the image, one a row, where diffusers multiplies by a number; rows get the bits of that number.

    Args:
        scales: [B, 1, 1], float32.
    """

    def __init__(self, scales: torch.Tensor) -> None:
        self._scales = scales

    def __mul__(self, states: torch.Tensor) -> torch.Tensor:
        # A number is multiplied in float32 too, whatever the states' dtype.
        return (self._scales * states.float()).to(states.dtype)


class IPAdapter(GuidedDiffusion):
    """A Stable Diffusion model with an IP-Adapter on one device.

    Raises:
        GeneratorError: if a part cannot be found, is of another kind, does not fit, or is not safetensors.
    """

    BY_ROW = ("guidance_scale", "adapter_scale")
    PARAMETERS = (*GuidedDiffusion.PARAMETERS, "adapter_scale")
    SETTINGS = (
        "revision", "dtype", "adapter", "image_encoder", "lora", "lora_scale", "sampler", "gamma", "prompt",
        "preprocess", "image_size",
    )  # fmt: skip

    def __init__(self, config: IPAdapterConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINES, PARTS)
        self._xl = read_json(folder / DIFFUSERS).get("_class_name") == PIPELINES[1]
        adapter = find_file(config.adapter, "generator.adapter")
        encoder = find_part(config.image_encoder, "generator.image_encoder")
        lora = find_file(config.lora, "generator.lora") if config.lora else None
        dtype = getattr(torch, config.dtype)
        self._image_encoder = load_network(CLIPVisionModelWithProjection, encoder.parent, encoder.name, dtype, device)
        self._unet = load_network(UNet2DConditionModel, folder, "unet", dtype, device)
        self._vae = load_vae(folder, dtype, device)
        if lora is not None:
            fuse_lora(self._unet, lora, read_tensors(lora), config.lora_scale)
        self._tokens = self._load_adapter(adapter)
        check_weights("generator.adapter or generator.lora, in the UNet", self._unet.state_dict())
        self._unet.eval().requires_grad_(False)
        self._given, self._empty = embed_prompt_and_empty(folder, config.prompt, self._xl, dtype, device)
        vision, sampler = self._image_encoder.config, _sampler(config, folder)
        self._preprocessing = Preprocessing(int(vision.image_size), MEAN, STD, config.preprocess)
        self.preprocess = self._preprocessing.preprocess  # type: ignore[method-assign]
        channels, scale = int(self._unet.config["in_channels"]), factor_of(self._vae)
        super().__init__(config, device, sampler=sampler, channels=channels, scale=scale)
        self._shape = (
            (1 + (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
            if self._tokens
            else (1, vision.projection_dim)
        )
        blank = torch.zeros((1, 3, vision.image_size, vision.image_size), device=device, dtype=dtype)
        # Without an image, the base adapter sees a zero embedding, the plus adapter the embedding of a zero image.
        self._blank = self._encode(blank) if self._tokens else torch.zeros((1, *self._shape), device=device)
        self._check_adapter(adapter, dtype)
        second = ["_2"] if self._xl else []
        texts, tokenizers = ([part + end for end in ["", *second]] for part in ("text_encoder", "tokenizer"))
        files = pipeline_files(folder, ["unet", "vae", *texts], ["scheduler", *tokenizers])
        facts: list[Fact] = [
            SAMPLER_VERSION,
            config.dtype,
            f"sampler={config.sampler},{config.gamma}",
            f"prompt={config.prompt}",
            f"adapter={fingerprint_file(adapter).hex()}",
            ("encoder=", fingerprint_model(encoder, network_files(encoder))),
            f"lora={fingerprint_file(lora).hex()},{config.lora_scale}" if lora else "lora=none",
            *self._preprocessing.facts(),
            *sampler.facts,
        ]
        self._describe_sizes(
            config,
            fingerprint_model(folder, files, *facts),
            int(self._unet.config["sample_size"]) * scale,
            licence_of(folder, "see the models' pages (IP-Adapter: Apache-2.0; SD 1.5 and SDXL: OpenRAIL)"),
            embedding_dim=self._shape[0] * self._shape[1],
        )

    def _load_adapter(self, path: Path) -> bool:
        """Puts the adapter into the UNet; says whether it reads the encoder's tokens (plus) or its embedding (base)."""
        parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in read_tensors(path).items():
            part, _, rest = key.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        projection = parts["image_proj"]
        plus = "latents" in projection
        if not parts["ip_adapter"] or not (plus or "proj.weight" in projection):
            raise GeneratorError(
                f"{path}: is neither a base nor a plus IP-Adapter (its keys begin {sorted(projection)[:3]}); "
                "face and full-face adapters are not supported"
            )
        try:
            with quiet_libraries():
                self._unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise GeneratorError(f"{path}: does not fit this model's UNet ({reason}); take its own adapter") from None
        return plus

    def _check_adapter(self, path: Path, dtype: torch.dtype) -> None:
        try:
            with torch.inference_mode():
                self._unet.encoder_hid_proj([self._blank[:, None].to(dtype)])
        except RuntimeError as error:
            raise GeneratorError(
                f"{path}: takes no embeddings of {self._shape[-1]} numbers, as generator.image_encoder makes them "
                f"({error}); take the encoder that it was trained with"
            ) from None

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns what the adapter reads of an image: [B, tokens, width], of one token for a base adapter."""
        with torch.inference_mode():
            if self._tokens:
                states: torch.Tensor = self._image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
                return states
            embeds: torch.Tensor = self._image_encoder(pixels).image_embeds
            return embeds[:, None]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, embedding_dim] on the CPU.

        Of a plus adapter these are all tokens of the encoder's last layer but one, flattened: 257 x 1280 for ViT-H.
        """
        pixels = self._preprocessing.normalise(images).to(self._device, self._dtype)
        return self._encode(pixels).float().flatten(1).cpu()

    def _bounds(self) -> dict[str, tuple[float, float]]:
        return super()._bounds() | {"adapter_scale": (0, 10)}

    def _condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings.view(-1, *self._shape)

    def _unconditioned(self, condition: torch.Tensor) -> torch.Tensor:
        return self._blank.to(condition.dtype).expand_as(condition)

    def _output(self, x: torch.Tensor, time: float, condition: torch.Tensor, own: Columns, free: int) -> torch.Tensor:
        scales = own[:, self.BY_ROW.index("adapter_scale")].tolist()
        scale: float | RowScales = scales[0]
        if any(other != scale for other in scales):
            scale = RowScales(torch.tensor(scales, dtype=torch.float32, device=x.device).view(-1, 1, 1))
        for processor in self._unet.attn_processors.values():
            if hasattr(processor, "to_k_ip"):
                processor.scale = [scale]
        prompts = [(self._empty, free), (self._given, len(x) - free)]
        text = torch.cat([prompt.tokens.expand(rows, -1, -1) for prompt, rows in prompts])
        # A row, one image, its tokens: the axis of images is what the stock pipeline fills with the other rows.
        added: dict[str, object] = {"image_embeds": [condition[:, None] if self._tokens else condition]}
        if self._xl:
            size = float(x.shape[-1] * self._scale)
            added["text_embeds"] = torch.cat([prompt.pooled.expand(rows, -1) for prompt, rows in prompts])
            added["time_ids"] = x.new_tensor([size, size, 0, 0, size, size]).expand(len(x), -1)
        output: torch.Tensor = self._unet(
            x, time, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]
        return output


def _sampler(config: IPAdapterConfig, folder: Path) -> Sampler:
    match config.sampler:
        case "lcm":
            return LCM(folder)
        case "tcd":
            return TCD(folder, config.gamma)
        case "ddim_trailing":
            return read_ddim(folder, "trailing")
        case "ddim":
            return read_ddim(folder)
