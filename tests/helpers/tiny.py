"""A random Stable unCLIP pipeline on disk: cross-attention, a VAE of four levels, v or epsilon prediction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from genssl.backbones.configs import ResNet18Config
from genssl.generators.conditioner import FILE, save_encoder
from genssl.registry import BACKBONES


def build_tiny_unclip(
    folder: Path, prediction_type: str = "v_prediction", *, width: int = 32, text_width: int = 32
) -> Path:
    """Writes the pipeline and returns its folder. Its image encoder takes 32 px, its images have 64 px.

    `width` is the embedding's and `text_width` the text's; of other than 32, the denoiser written does not fit.
    """
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    scratch = folder.with_name(folder.name + "-tokens")
    scratch.mkdir()
    (scratch / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (scratch / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(scratch / "vocab.json"), str(scratch / "merges.txt"), model_max_length=77)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableUnCLIPImg2ImgPipeline(
            feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
            image_encoder=CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=32,
                    projection_dim=width,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=32,
                    intermediate_size=37,
                    patch_size=8,
                )
            ),
            image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=width),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            tokenizer=tokenizer,
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(vocabulary),
                    hidden_size=text_width,
                    intermediate_size=37,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    bos_token_id=len(vocabulary) - 2,
                    eos_token_id=len(vocabulary) - 1,
                    pad_token_id=len(vocabulary) - 1,
                )
            ),
            unet=UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(32, 64),
                layers_per_block=1,
                attention_head_dim=(2, 4),
                class_embed_type="projection",
                projection_class_embeddings_input_dim=64,
                cross_attention_dim=32,
                use_linear_projection=True,
            ),
            scheduler=DDIMScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                prediction_type=prediction_type,
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                timestep_spacing="trailing",
                rescale_betas_zero_snr=True,
            ),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8, 8, 16, 16),
                layers_per_block=1,
                norm_num_groups=8,
                sample_size=64,
            ),
        )
        # Statistics other than 0 and 1, so that a forgotten normalisation shows.
        pipeline.image_normalizer.mean.data.normal_(0, 0.3)
        pipeline.image_normalizer.std.data.uniform_(0.5, 2.0)
    pipeline.save_pretrained(folder)
    return folder


def build_own_unclip(folder: Path, pipeline: Path, *, width: int = 4, seed: int = 0) -> Path:
    """Copies a pipeline of `build_tiny_unclip` with a random encoder of genssl in place of its CLIP.

    The encoder takes 32 px and its embeddings have 8 `width` numbers; of other than 4, the denoiser does not fit.
    """
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("image_encoder", "feature_extractor"))
    block = ResNet18Config(stem="small", width=width)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_encoder(folder / FILE, BACKBONES.get("resnet18")(block), block, image_size="32")
    index = folder / "model_index.json"
    nothing = {"image_encoder": [None, None], "feature_extractor": [None, None]}
    index.write_text(json.dumps(json.loads(index.read_text()) | nothing))
    return folder
