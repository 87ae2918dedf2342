"""Measures a generator on held-out sources: do variants keep the class of their source, and do they differ?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC

from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.generators.base import Generator, Parameters
from genssl.variants.engine import VariantEngine


@dataclass(frozen=True)
class Sweep:
    """The settings at which a kind of generator is measured: `fixed` holds in all of them, one of `varied` in each."""

    fixed: Parameters
    varied: tuple[Parameters, ...]


SWEEPS = {
    "icgan": Sweep({"best_of": 1}, tuple({"truncation": truncation} for truncation in (0.3, 0.5, 0.7, 1.0, 2.0))),
    "stable_unclip": Sweep(
        {"num_inference_steps": 4, "guidance_scale": 1.0},
        tuple({"noise_level": level} for level in (0, 200, 300, 400, 500)),
    ),
    "flow": Sweep(
        {"guidance_scale": 1.0},
        tuple(
            {"num_inference_steps": steps, "embedding_noise": noise}
            for steps in (1, 2, 4, 8)
            for noise in (0.0, 0.3, 0.6)
        ),
    ),
}
"""By registry name; a generator without an entry is measured at its defaults."""

BATCH = 64
MAX_SOURCES = 2000
MAX_JUDGED_ON = 5000
VARIANTS = 4


def measure(generator: Generator, train: ImageDataset, test: ImageDataset, measured_on: str = "test") -> dict[str, Any]:
    """Returns label agreement, diversity and speed over the settings of `SWEEPS`.

    Labels, where there are any, are used to judge only: an RBF support-vector machine on the pixels of the real train
    images classifies the variants. Images are compared at the data set's size.
    """
    rows = range(min(len(test), MAX_SOURCES))
    labels = np.array([test.label(row) for row in rows])
    judge, judged_by = None, "no labels"
    # An SVM's cost grows with the square of the images; evenly spaced ones judge as well.
    known = range(0, len(train), max(1, len(train) // MAX_JUDGED_ON))
    classes = [train.label(row) for row in known if train.label(row) >= 0]
    if len(set(classes)) > 1:
        train_pixels = np.stack([_flat(train.image(row)) for row in known if train.label(row) >= 0])
        judge = SVC(C=10).fit(train_pixels, classes)
        real = judge.score(np.stack([_flat(test.image(row)) for row in rows]), labels)
        judged_by = (
            f"an RBF-SVM on the pixels of {len(classes)} real train images "
            f"({100 * real:.1f} % right on the real sources)"
        )
    sources = np.stack([_flat(test.image(row)) for row in rows])
    engine = VariantEngine(generator, [BATCH])
    embeddings, _ = engine.embed([generator.preprocess(decode(test.stored(row))) for row in rows])
    settings = []
    sweep = SWEEPS.get(generator.spec.name, Sweep({}, ({},)))
    for varied in sweep.varied:
        complete = engine.complete(sweep.fixed | varied)
        work = [
            engine.row(test.source_id(row), embeddings[row], index, complete)
            for index in range(VARIANTS)
            for row in rows
        ]
        batches = [engine.generate(work[start : start + BATCH]) for start in range(0, len(work), BATCH)]
        images = np.concatenate([images for images, _ in batches])
        variants = np.stack([_flat(image) for image in images]).reshape(VARIANTS, len(rows), -1)
        pairs = [np.linalg.norm(variants[a] - variants[b], axis=1).mean() for a in range(VARIANTS) for b in range(a)]
        agreement = (
            None
            if judge is None
            else round(float(np.mean([(judge.predict(one) == labels).mean() for one in variants])), 4)
        )
        settings.append(
            {
                **varied,
                "label_agreement": agreement,
                "distance_within_source": round(float(np.mean(pairs)), 3),
                "variants_per_second": round(len(work) / sum(seconds for _, seconds in batches)),
            }
        )
    return {
        "sources": len(rows),
        "measured_on": measured_on,
        "variants_per_source": VARIANTS,
        "fixed": sweep.fixed,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "label_agreement_by": judged_by,
        "distance_between_real_images": round(float(np.linalg.norm(sources[1:] - sources[:-1], axis=1).mean()), 3),
        "settings": settings,
    }


def columns(quality: dict[str, Any]) -> list[str]:
    """Returns the headings of the table of `quality["settings"]`, as people write them."""
    written = {"variants_per_second": "variants/s"}
    return [written.get(key, key.replace("_", " ")) for key in quality["settings"][0]]


def cell(value: float | int | None) -> str:
    """Returns a number of that table as text; None is a label agreement that nothing could judge."""
    return "no labels" if value is None else f"{value:,}"


def _flat(image: UInt8Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    flat: np.ndarray[Any, np.dtype[np.float64]] = image.astype(np.float64).ravel() / 255 / np.sqrt(3)
    return flat
