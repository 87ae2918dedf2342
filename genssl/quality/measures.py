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
from genssl.evaluators.base import FrozenEncoder
from genssl.generators.base import Generator
from genssl.generators.parameters import Parameters
from genssl.quality.judges import PIXELS_SIDE, Pixels
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
VARIANTS = 4
FEWEST = 16  # sources, however dear one is
MAX_JUDGED_ON = 5000


@dataclass(frozen=True)
class Effort:
    """How much is measured at the most.

    Attributes:
        sources: held-out images, evenly spaced.
        judged_on: labelled train images that the judge of labels learns from.
        work: pixels times sampler steps of all variants of a sweep, which sources are left out for (on two cores a
            flow of two levels does about a million a second).
    """

    sources: int
    judged_on: int
    work: float


EFFORTS = {"quick": Effort(256, 1000, 1e8), "full": Effort(2000, MAX_JUDGED_ON, 2e9)}
"""By the `quality` of a generator's recipe."""

Report = Callable[[str, int, int], None]
"""Called with (what is measured, work done, work in all)."""


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
    effort: str = "full",
    report: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Returns label agreement, diversity and speed over the settings of a sweep, by default `sweep_of` the generator.

    Images are compared by their pixels, those above 32 pixels a side shrunk to that by area, as float32: what is in
    memory grows neither with the images' size nor with their number. Labels, where there are any, are used to judge
    only: an RBF support-vector machine on the same features of the real train images classifies the variants.

    Args:
        generator: what is measured.
        train: what it was trained on.
        test: where sources come from.
        measured_on: what `test` is, for the result.
        sweep: other settings.
        effort: a name of `EFFORTS`.
        report: is told after every batch.
    """
    bounds, engine = EFFORTS[effort], VariantEngine(generator, [BATCH])
    sweep = sweep or sweep_of(generator)
    parameters = [engine.complete(sweep.fixed | varied).parameters for varied in sweep.varied]
    steps = [int(complete.get("num_inference_steps", 1)) for complete in parameters]
    affordable = int(bounds.work / (VARIANTS * sum(steps) * generator.spec.image_size**2))
    count = min(len(test), bounds.sources, max(affordable, FEWEST))
    rows = [number * len(test) // count for number in range(count)]
    side = min(test.image_size, PIXELS_SIDE)
    pixels = FrozenEncoder(Pixels(side, grey=False), torch.device("cpu"))
    shrunk = "" if side == test.image_size else f", shrunk to {side} px a side"
    sources = pixels.encode_rows(test, rows).numpy()
    labels = np.array([test.label(row) for row in rows])
    known = labels >= 0
    judge, judged_on = None, 0
    if known.any():
        judge, judged_on = label_judge(train, lambda rows: pixels.encode_rows(train, rows).numpy(), bounds.judged_on)
    judged_by = "no labels"
    if judge is not None:
        judged_by = (
            f"an RBF-SVM on the pixels of {judged_on} real train images{shrunk} "
            f"({100 * judge.score(sources[known], labels[known]):.1f} % right on the real sources)"
        )
    embeddings = embedded(engine, test, rows)
    settings, done, total = [], 0, VARIANTS * count * sum(steps)
    for number, (varied, each) in enumerate(zip(sweep.varied, steps, strict=True), start=1):
        what = f"measuring: setting {number} of {len(steps)}"

        def kept(images: UInt8Array, what: str = what, each: int = each) -> Array:
            nonlocal done
            done += len(images) * each
            report(what, done, total)
            return pixels.encode(images).numpy()

        made, seconds = generated(engine, test, rows, embeddings, sweep.fixed | varied, VARIANTS, kept)
        variants = made.reshape(VARIANTS, count, -1)
        agreement = None
        if judge is not None:
            right = [(judge.predict(one[known]) == labels[known]).mean() for one in variants]
            agreement = round(float(np.mean(right)), 4)
        settings.append(
            {
                **varied,
                "label_agreement": agreement,
                "distance_within_source": round(distance_within(variants), 3),
                "variants_per_second": round(len(made) / seconds),
            }
        )
    apart = np.linalg.norm(sources[1:] - sources[:-1], axis=1)
    return {
        "sources": count,
        "measured_on": measured_on,
        "quality": effort,
        "variants_per_source": VARIANTS,
        "fixed": sweep.fixed,
        "features": f"pixels in RGB at {side} px a side",
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "label_agreement_by": judged_by,
        "distance_between_real_images": round(float(apart.mean()), 3) if count > 1 else None,
        "settings": settings,
    }


def label_judge(
    train: ImageDataset, encode: Callable[[list[int]], Array], most: int = MAX_JUDGED_ON
) -> tuple[SVC | None, int]:
    """Fits an RBF support-vector machine that judges whether variants keep their class.

    Args:
        train: its labelled images are learnt from.
        encode: returns the features [n, D] of rows of train.
        most: of its images, evenly spaced, are looked at.

    Returns:
        The machine, or None without two classes; and the number of images that it has learnt from.
    """
    # An SVM's cost grows with the square of the images; evenly spaced ones judge as well.
    known = [row for row in range(0, len(train), max(1, -(-len(train) // most))) if train.label(row) >= 0]
    classes = [train.label(row) for row in known]
    if len(set(classes)) < 2:
        return None, 0
    return SVC(C=10).fit(encode(known), classes), len(known)


def embedded(engine: VariantEngine, dataset: ImageDataset, rows: Sequence[int]) -> list[torch.Tensor]:
    """Returns what the generator conditions on for rows of a data set, float32 [D] each."""
    found: list[torch.Tensor] = []
    for start in range(0, len(rows), BATCH):  # photos are large, and need not all be in memory
        part = rows[start : start + BATCH]
        found += engine.embed([engine.generator.preprocess(decode(dataset.stored(row))) for row in part])[0]
    return found


def generated(
    engine: VariantEngine,
    dataset: ImageDataset,
    rows: Sequence[int],
    embeddings: Sequence[torch.Tensor],
    parameters: Parameters,
    variants: int,
    kept: Callable[[UInt8Array], Array] = lambda images: images,
) -> tuple[Array, float]:
    """Makes variants 0, 1, ... of rows of a data set.

    Args:
        engine: with the generator.
        dataset, rows, embeddings: of the sources.
        parameters: on top of the generator's defaults.
        variants: of every source.
        kept: what is kept of a batch of images uint8 [B, 3, S, S], an array [B, ...]; S is the generator's size.

    Returns:
        What is kept [variants * len(rows), ...], all of variant 0 first, in the order of the rows; and the seconds that
        the generator took.
    """
    settings = engine.complete(parameters)
    work = [
        engine.row(dataset.source_id(row), embedding, index, settings)
        for index in range(variants)
        for row, embedding in zip(rows, embeddings, strict=True)
    ]
    seconds, found = 0.0, np.empty(0)
    for positions in engine.batches(work):
        images, spent = engine.generate([work[position] for position in positions])
        part = kept(images)
        if len(found) == 0:
            found = np.empty((len(work), *part.shape[1:]), part.dtype)
        found[positions] = part
        seconds += spent
    return found, seconds


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
