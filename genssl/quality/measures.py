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
    # --- sources: as many as the effort allows ---
    bounds, engine = EFFORTS[effort], VariantEngine(generator, [BATCH])
    sweep = sweep or sweep_of(generator)
    parameters = [engine.complete(sweep.fixed | varied).parameters for varied in sweep.varied]
    steps = [int(complete.get("num_inference_steps", 1)) for complete in parameters]
    affordable = int(bounds.work / (VARIANTS * sum(steps) * generator.spec.image_size**2))
    count = min(len(test), bounds.sources, max(affordable, FEWEST))
    rows = [number * len(test) // count for number in range(count)]
    # --- judge ---
    side = min(test.image_size, PIXELS_SIDE)
    pixels = FrozenEncoder(Pixels(side, grey=False), torch.device("cpu"))
    real = pixels.encode_rows(test, rows).numpy()
    labels = [test.label(row) for row in rows]
    judge = LabelJudge(train, lambda rows: pixels.encode_rows(train, rows).numpy(), labels, bounds.judged_on)
    judged_by = "no labels"
    if (right := judge.agreement(real[None])) is not None:
        shrunk = "" if side == test.image_size else f", shrunk to {side} px a side"
        judged_by = (
            f"an RBF-SVM on the pixels of {judge.learnt_from} real train images{shrunk} ({100 * right:.1f} % right on "
            "the real sources)"
        )
    # --- settings ---
    sources = Sources(engine, test, rows)
    settings, done, total = [], 0, VARIANTS * count * sum(steps)
    for number, (varied, each) in enumerate(zip(sweep.varied, steps, strict=True), start=1):
        what = f"measuring: setting {number} of {len(steps)}"

        def kept(images: UInt8Array, what: str = what, each: int = each) -> Array:
            nonlocal done
            done += len(images) * each
            report(what, done, total)
            return pixels.encode(images).numpy()

        made, seconds = sources.variants(sweep.fixed | varied, VARIANTS, kept)
        variants = made.reshape(VARIANTS, count, -1)
        agreement = judge.agreement(variants)
        settings.append(
            {
                **varied,
                "label_agreement": None if agreement is None else round(agreement, 4),
                "distance_within_source": round(distance_within(variants), 3),
                "variants_per_second": round(len(made) / seconds),
            }
        )
    apart = np.linalg.norm(real[1:] - real[:-1], axis=1)
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


class LabelJudge:
    """Judges whether variants keep the class of their source: an RBF support-vector machine on real train images.

    Args:
        train: its labelled images are learnt from.
        encode: returns the features [n, D] of rows of train.
        labels: of the sources, int [N]; -1 where there is none.
        most: images of train that are looked at, evenly spaced.

    Attributes:
        learnt_from: number of images; 0 if there is nothing to judge or to learn from.
    """

    def __init__(
        self,
        train: ImageDataset,
        encode: Callable[[list[int]], Array],
        labels: Sequence[int],
        most: int = MAX_JUDGED_ON,
    ) -> None:
        self._labels = np.array(labels)
        self._known = self._labels >= 0
        self._machine, self.learnt_from = None, 0
        if not self._known.any():
            return
        # An SVM's cost grows with the square of the images; evenly spaced ones judge as well.
        rows = [row for row in range(0, len(train), max(1, -(-len(train) // most))) if train.label(row) >= 0]
        classes = [train.label(row) for row in rows]
        if len(set(classes)) > 1:
            self._machine, self.learnt_from = SVC(C=10).fit(encode(rows), classes), len(rows)

    def agreement(self, variants: Array) -> float | None:
        """Returns the part of features [V, N, D] of the sources' variants in their class; None without labels."""
        if self._machine is None:
            return None
        labels = self._labels[self._known]
        return float(np.mean([(self._machine.predict(one[self._known]) == labels).mean() for one in variants]))


class Sources:
    """Sources of a data set, and the variants that a generator makes of them.

    Args:
        engine: with the generator.
        dataset, rows: of the sources.

    Attributes:
        embeddings: what the generator conditions on, float32 [D] each.
    """

    def __init__(self, engine: VariantEngine, dataset: ImageDataset, rows: Sequence[int]) -> None:
        self._engine, self._dataset, self._rows = engine, dataset, rows
        self.embeddings: list[torch.Tensor] = []
        for start in range(0, len(rows), BATCH):  # photos are large, and need not all be in memory
            stored = (dataset.stored(row) for row in rows[start : start + BATCH])
            self.embeddings += engine.embed([engine.generator.preprocess(decode(image)) for image in stored])[0]

    def variants(
        self,
        parameters: Parameters,
        count: int,
        kept: Callable[[UInt8Array], Array] = lambda images: images,
        first: int | None = None,
    ) -> tuple[Array, float]:
        """Makes variants 0..count - 1 of the sources.

        Args:
            parameters: on top of the generator's defaults.
            count: of every source.
            kept: what is kept of a batch of images uint8 [B, 3, S, S], an array [B, ...]; S is the generator's size.
            first: only of so many sources.

        Returns:
            What is kept [count * N, ...], all of variant 0 first, in the order of the sources; and the seconds that the
            generator took.
        """
        engine, settings = self._engine, self._engine.complete(parameters)
        work = [
            engine.row(self._dataset.source_id(row), embedding, index, settings)
            for index in range(count)
            for row, embedding in zip(self._rows[:first], self.embeddings[:first], strict=True)
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
