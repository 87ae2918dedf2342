"""Measures a generator on held-out sources: do variants keep the class of their source, and do they differ?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC

from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.generators.stable_unclip import StableUnCLIP
from genssl.variants.engine import VariantEngine

NOISE_LEVELS = (0, 200, 300, 400, 500)
BATCH = 64
MAX_SOURCES = 2000
MAX_JUDGED_ON = 5000
VARIANTS = 4
STEPS, GUIDANCE = 4, 1.0


def measure(generator: StableUnCLIP, train: ImageDataset, test: ImageDataset) -> dict[str, Any]:
    """Returns label agreement, diversity and speed over noise levels.

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
    for level in NOISE_LEVELS:
        complete = engine.complete({"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "noise_level": level})
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
                "noise_level": level,
                "label_agreement": agreement,
                "distance_within_source": round(float(np.mean(pairs)), 3),
                "variants_per_second": round(len(work) / sum(seconds for _, seconds in batches)),
            }
        )
    return {
        "sources": len(rows),
        "variants_per_source": VARIANTS,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "label_agreement_by": judged_by,
        "distance_between_real_images": round(float(np.linalg.norm(sources[1:] - sources[:-1], axis=1).mean()), 3),
        "settings": settings,
    }


def _flat(image: UInt8Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    flat: np.ndarray[Any, np.dtype[np.float64]] = image.astype(np.float64).ravel() / 255 / np.sqrt(3)
    return flat
