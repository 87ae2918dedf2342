"""Measuring a generator of large images: what is in memory, how much is measured, and what is said on the way."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.base import StoredImage, UInt8Array, raw_image
from genssl.generators.base import GeneratorSpec
from genssl.generators.parameters import Parameters
from genssl.quality import card as quality_card
from genssl.quality.card import CardRequest, evaluate_generator
from genssl.quality.measures import EFFORTS, FEWEST, LabelJudge, Sweep, measure

SIZE = 224


class Noisy:
    """Adds a row's noise to the grey that its source has: a generator of large images that costs nothing."""

    def __init__(self, size: int = SIZE) -> None:
        self.spec = GeneratorSpec("noisy", "none", bytes(16), 1, size, "none", {"num_inference_steps": 1}, {})

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        return image[:, :8, :8]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2, 3))[:, None]

    def check(self, parameters: Parameters) -> None:
        pass

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        return (parameters["num_inference_steps"],)

    def generate(self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Any, **_: Any) -> torch.Tensor:
        shades = [row.item() + seed % 16 for row, seed in zip(embeddings, seeds, strict=True)]
        side = self.spec.image_size
        return torch.tensor(shades).clamp(0, 255).to(torch.uint8)[:, None, None, None].repeat(1, 3, side, side)


class Greys:
    """Large images of two classes, dark and light, made when they are asked for."""

    name, class_names, skipped = "greys", ["dark", "light"], list[str]()

    def __init__(self, count: int, size: int = SIZE) -> None:
        self._count, self.image_size = count, size

    def __len__(self) -> int:
        return self._count

    def image(self, row: int) -> UInt8Array:
        return np.full((3, self.image_size, self.image_size), 40 + 140 * (row % 2) + row % 16, np.uint8)

    def label(self, row: int) -> int:
        return row % 2

    def stored(self, row: int) -> StoredImage:
        return raw_image(self.image(row))

    def source_id(self, row: int) -> bytes:
        return self.stored(row).source_id


def peak_of(action: Any) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        return action(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_is_in_memory_does_not_grow_with_the_images_size():
    """The variants of one setting alone are 120 MB, and 963 MB as float64."""
    quality, peak = peak_of(lambda: measure(Noisy(), Greys(200), Greys(200)))
    assert quality["sources"] == 200
    assert quality["settings"][0]["label_agreement"] == 1.0
    assert quality["features"] == "pixels in RGB at 32 px a side"
    assert "pixels of 200 real train images, shrunk to 32 px a side" in quality["label_agreement_by"]
    assert peak < 80e6, "two batches of 94 images, features, and what an SVM takes"


def test_the_work_is_bounded_and_sources_are_evenly_spaced(monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(Greys, "source_id", lambda self, row: seen.append(row) or bytes([row % 256]) * 16)

    def count(effort: str, size: int, *steps: int) -> int:
        sweep = Sweep({}, tuple({"num_inference_steps": number} for number in steps))
        told: list[tuple[str, int, int]] = []
        report = lambda *what: told.append(what)  # noqa: E731
        quality = measure(Noisy(size), Greys(40, 8), Greys(600, 8), "test", sweep, effort, report)
        assert told[-1] == (f"measuring: setting {len(steps)} of {len(steps)}", told[-1][2], told[-1][2])
        assert told[-1][2] == 4 * quality["sources"] * sum(steps)
        return int(quality["sources"])

    assert count("quick", 8, 1) == EFFORTS["quick"].sources == 256
    assert min(seen) == 0
    assert max(seen) == 255 * 600 // 256, "not the first 256, which in a folder would be of one class"
    assert count("full", 8, 1) == 600
    assert count("quick", 64, 40, 80) == 1e8 // (4 * 120 * 64**2) == 50
    assert count("quick", 64, 1000) == FEWEST


def test_the_judge_looks_at_no_more_than_it_may():
    asked: list[list[int]] = []

    def encode(rows: list[int]) -> np.ndarray[Any, Any]:
        asked.append(rows)
        return np.random.default_rng(0).random((len(rows), 2))

    assert LabelJudge(Greys(99, 8), encode, [0, 1], 34).learnt_from == len(asked[0]) == 33


def test_a_card_of_large_images_keeps_features_alone(tmp_path: Path, monkeypatch):
    size, sources = 128, 32
    for number in range(2 * sources):
        folder = tmp_path / ("train" if number < sources else "test") / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (100 * (number % 2) + number, 9, 9)).save(folder / f"{number}.png")
    monkeypatch.setattr(quality_card, "open_generator", lambda config, device: Noisy(size))
    block = f"{{name: folder, root: '{tmp_path}/train', test_root: '{tmp_path}/test', image_size: {size}}}"
    recipe = load(Recipe, Path("recipes/simclr_flow.yaml"), [f"dataset={block}", "train.threads=1"])
    card, peak = peak_of(lambda: evaluate_generator(recipe, CardRequest({}, sources=sources, variants=8)))
    assert card["protocol"]["judge"] == {"name": "pixels", "side": 32, "channels": 3}
    assert card["rows"][1]["vendi_per_source"] > 1
    assert peak < 7 * sources * 3 * size**2, "the variants alone are eight times the sources"
