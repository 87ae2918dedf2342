"""`genssl train-generator`: trains, measures on held-out images, and writes a diffusers folder with a model card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from genssl import __version__
from genssl.config.generator_recipe import GeneratorRecipe
from genssl.data.base import ImageDataset
from genssl.data.load import load_dataset
from genssl.errors import UserError
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.stable_unclip import StableUnCLIP, quiet_libraries
from genssl.runtime import pick_device, seeded_initialisation, set_threads
from genssl.training.generator_quality import measure
from genssl.training.unclip import TEXT_WIDTH, TrainedUnCLIP, train_unclip

TOKENS = 8


def train_generator(recipe: GeneratorRecipe, folder: Path, console: Console) -> dict[str, Any]:
    """Trains the generator of a recipe and writes its folder, whole or not at all.

    Args:
        recipe: what to train, and on what.
        folder: written; refused if it exists.
        console: for the progress.

    Returns:
        The measured quality, as quality.json holds it.

    Raises:
        UserError: if the folder exists, sizes do not fit, or the data set is not there.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; give another folder with --out, or remove it")
    device = pick_device(recipe.device)
    if device.type == "cpu":
        set_threads(recipe.threads)
    train = load_dataset(recipe.dataset, "train")
    test = load_dataset(recipe.dataset, "test")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be created ({error.strerror})") from None
    try:
        started = time.perf_counter()
        with _Progress(console) as progress:
            trained = train_unclip(recipe, train, device, progress)
        seconds = time.perf_counter() - started
        _save_pipeline(trained, partial, train.image_size, recipe.seed)
        _write_json(partial / "card.json", _card(recipe, train, seconds))
        quality = measure(StableUnCLIP(StableUnCLIPConfig(model=str(partial)), device), train, test)
        _write_json(partial / "quality.json", quality)
        (partial / "README.md").write_text(_readme(recipe, quality, seconds))
        partial.chmod(0o755)
        for path in partial.rglob("*.safetensors"):  # the hub library writes them readable by their owner alone
            path.chmod(0o644)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return quality


class _Progress:
    """A bar a stage on a terminal, five lines a stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._bar: Progress | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        if not self._console.is_terminal:
            if step % max(1, steps // 5) == 0:
                self._console.print(f"{stage}: step {step}/{steps}, loss {loss:.4f}")
            return
        if stage != self._stage:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task(stage, total=steps, loss=loss)
            self._bar.start()
            self._stage = stage
        assert self._bar is not None
        self._bar.update(self._bar.task_ids[0], completed=step, loss=loss)
        if step == steps:
            self._bar.stop()


def _save_pipeline(trained: TrainedUnCLIP, folder: Path, image_size: int, seed: int) -> None:
    """Writes the trained parts, and a text path that says nothing, as a StableUnCLIPImg2ImgPipeline."""
    tokenizer = _tokenizer(folder)
    with seeded_initialisation("text", seed):
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=TEXT_WIDTH,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    half = [0.5, 0.5, 0.5]
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=half,
            image_std=half,
        ),
        image_encoder=trained.image_encoder.cpu(),
        image_normalizer=trained.normalizer.cpu(),
        image_noising_scheduler=trained.noising,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=trained.denoiser.cpu(),
        scheduler=trained.scheduler,
        vae=trained.autoencoder.cpu(),
    )
    with quiet_libraries():
        pipeline.save_pretrained(folder, safe_serialization=True)


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a CLIP tokenizer over printable characters: enough for the empty prompt, and no download."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        token: i
        for i, token in enumerate([*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"])
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        vocab, merges = Path(scratch) / "vocab.json", Path(scratch) / "merges.txt"
        vocab.write_text(json.dumps(vocabulary))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=TOKENS)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _card(recipe: GeneratorRecipe, train: ImageDataset, seconds: float) -> dict[str, Any]:
    return {
        "licence": recipe.licence,
        "trained_by": f"genssl {__version__}, torch {torch.__version__}",
        "training_seconds": round(seconds),
        "dataset": {"name": train.name, "split": "train", "images": len(train), "labels_used": False},
        "recipe": recipe.model_dump(mode="json"),
    }


def _readme(recipe: GeneratorRecipe, quality: dict[str, Any], seconds: float) -> str:
    rows = "\n".join(
        f"| {row['noise_level']} | {row['label_agreement'] if row['label_agreement'] is not None else 'no labels'} | "
        f"{row['distance_within_source']} | {row['variants_per_second']} |"
        for row in quality["settings"]
    )
    return f"""# {recipe.name}

A miniature Stable unCLIP, trained by genssl {__version__} in {seconds:.0f} s. It is an ordinary diffusers folder
(`StableUnCLIPImg2ImgPipeline`); image encoder, autoencoder and denoiser are trained, the text path is a random
constant that the denoiser does not read.

- **Remade by** `genssl train-generator RECIPE --out DIR`; the recipe stands in `card.json`.
- **Data**: the train split of `{recipe.dataset.name}`; no labels, no other data, no pretrained weights.
- **Licence**: {recipe.licence}.
- **Use**: `generator: {{name: stable_unclip, model: DIR}}`.

Measured on {quality["sources"]} held-out sources, {quality["variants_per_source"]} variants each,
{quality["num_inference_steps"]} DDIM steps, guidance {quality["guidance_scale"]:g}, {quality["threads"]} CPU threads,
batches of {quality["batch"]}. Label agreement: {quality["label_agreement_by"]}.
Distance within a source: mean L2 between two variants, grey values in 0..1; two random real images are
{quality["distance_between_real_images"]} apart.

| noise level | label agreement | distance within a source | variants/s |
|---|---|---|---|
{rows}
"""
