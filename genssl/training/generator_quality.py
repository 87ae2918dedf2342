"""Measures a generator on held-out sources: do variants keep the class of their source, and do they differ?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.svm import SVC

from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.errors import RequestRefusedError
from genssl.generators.base import Generator, Parameters
from genssl.variants.engine import VariantEngine

Array = npt.NDArray[Any]


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

NOISES: tuple[Parameters, ...] = tuple({"embedding_noise": noise} for noise in (0.0, 0.3, 0.6))
"""At which a flow is measured whose steps are given: a student, and its teacher."""

BATCH = 64
MAX_SOURCES = 2000
MAX_JUDGED_ON = 5000
VARIANTS = 4


def sweep_of(generator: Generator) -> Sweep:
    """Returns the settings at which a generator is measured; those that it cannot do are left out."""
    sweep, defaults = SWEEPS.get(generator.spec.name, Sweep({}, ({},))), generator.spec.defaults

    def possible(varied: Parameters) -> bool:
        try:
            generator.check(defaults | sweep.fixed | varied)
        except RequestRefusedError:
            return False
        return True

    return Sweep(sweep.fixed, tuple(filter(possible, sweep.varied)) or ({},))


def measure(
    generator: Generator,
    train: ImageDataset,
    test: ImageDataset,
    measured_on: str = "test",
    sweep: Sweep | None = None,
) -> dict[str, Any]:
    """Returns label agreement, diversity and speed over the settings of a sweep, by default `sweep_of` the generator.

    Labels, where there are any, are used to judge only: an RBF support-vector machine on the pixels of the real train
    images classifies the variants. Images are compared at the data set's size.
    """
    rows = range(min(len(test), MAX_SOURCES))
    labels = np.array([test.label(row) for row in rows])
    sources = np.stack([_flat(test.image(row)) for row in rows])
    judge, judged_on = label_judge(train, lambda known: np.stack([_flat(train.image(row)) for row in known]))
    judged_by = "no labels"
    if judge is not None:
        judged_by = (
            f"an RBF-SVM on the pixels of {judged_on} real train images "
            f"({100 * judge.score(sources, labels):.1f} % right on the real sources)"
        )
    engine = VariantEngine(generator, [BATCH])
    embeddings = embedded(engine, test, rows)
    settings = []
    sweep = sweep or sweep_of(generator)
    for varied in sweep.varied:
        images, seconds = generated(engine, test, rows, embeddings, sweep.fixed | varied, VARIANTS)
        variants = np.stack([_flat(image) for image in images]).reshape(VARIANTS, len(rows), -1)
        agreement = (
            None
            if judge is None
            else round(float(np.mean([(judge.predict(one) == labels).mean() for one in variants])), 4)
        )
        settings.append(
            {
                **varied,
                "label_agreement": agreement,
                "distance_within_source": round(distance_within(variants), 3),
                "variants_per_second": round(len(images) / seconds),
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


def label_judge(train: ImageDataset, encode: Callable[[list[int]], Array]) -> tuple[SVC | None, int]:
    """Fits an RBF support-vector machine that judges whether variants keep their class.

    Args:
        train: its labelled images are learnt from; at most about `MAX_JUDGED_ON`, evenly spaced.
        encode: returns the features [n, D] of rows of train.

    Returns:
        The machine, or None without two classes; and the number of images that it has learnt from.
    """
    # An SVM's cost grows with the square of the images; evenly spaced ones judge as well.
    known = [row for row in range(0, len(train), max(1, len(train) // MAX_JUDGED_ON)) if train.label(row) >= 0]
    classes = [train.label(row) for row in known]
    if len(set(classes)) < 2:
        return None, 0
    return SVC(C=10).fit(encode(known), classes), len(known)


def embedded(engine: VariantEngine, dataset: ImageDataset, rows: Sequence[int]) -> list[torch.Tensor]:
    """Returns what the generator conditions on for rows of a data set, float32 [D] each."""
    return engine.embed([engine.generator.preprocess(decode(dataset.stored(row))) for row in rows])[0]


def generated(
    engine: VariantEngine,
    dataset: ImageDataset,
    rows: Sequence[int],
    embeddings: Sequence[torch.Tensor],
    parameters: Parameters,
    variants: int,
) -> tuple[UInt8Array, float]:
    """Makes variants 0, 1, ... of rows of a data set: uint8 [variants * len(rows), 3, S, S], and the seconds it took.

    All of variant 0 come first, in the order of the rows; S is the generator's size.
    """
    settings = engine.complete(parameters)
    work = [
        engine.row(dataset.source_id(row), embedding, index, settings)
        for index in range(variants)
        for row, embedding in zip(rows, embeddings, strict=True)
    ]
    spec, seconds = engine.generator.spec, 0.0
    images = np.empty((len(work), 3, spec.image_size, spec.image_size), np.uint8)
    for positions in engine.batches(work):
        images[positions], spent = engine.generate([work[position] for position in positions])
        seconds += spent
    return images, seconds


def distance_within(variants: Array) -> float:
    """Returns the mean Euclidean distance of two variants of a source; features [V, N, D] of V >= 2 variants."""
    count = len(variants)
    pairs = [np.linalg.norm(variants[a] - variants[b], axis=1).mean() for a in range(count) for b in range(a)]
    return float(np.mean(pairs))


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
