"""The quality card of a generator: consistency and diversity of its variants, beside standard augmentations.

The measures are those of `genssl.evaluators`; here is which images they are given.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genssl import __version__
from genssl.base.devices import pick_device, set_threads, stream
from genssl.base.files import write_atomically, write_json
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import resize_and_crop
from genssl.data.load import dataset_digest, hold_out, labels_note, left_out_note, load_dataset
from genssl.errors import DataError, UserError, suggest
from genssl.evaluators.base import FrozenEncoder
from genssl.evaluators.variants.consistency import retrieved
from genssl.evaluators.variants.frechet import frechet_distance, too_few
from genssl.evaluators.variants.prdc import prdc
from genssl.evaluators.variants.vendi import vendi_score
from genssl.generators.open import open_generator
from genssl.generators.parameters import Parameters
from genssl.quality.judges import Judge, load_judge
from genssl.quality.measures import BATCH, Array, LabelJudge, Sources, distance_within, sweep_of
from genssl.quality.picture import draw_quality
from genssl.variants.engine import VariantEngine
from genssl.views.augmentations import Augmentations

NEIGHBOURS = 5  # of precision, recall, density and coverage
FEWEST = 12  # sources: the two halves must each have more than NEIGHBOURS
MAX_TRAIN = 20_000  # images that variants are compared with for memorisation


@dataclass(frozen=True)
class CardRequest:
    """What a card is to measure."""

    vary: dict[str, list[float]]  # values by parameter, in all combinations; empty for the family's own sweep
    judge: str = "pixels"  # or an encoder, as `load_encoder` takes it
    sources: int = 2000  # at most so many, drawn at random
    variants: int = 4  # of every source, 2 or more
    split: str = "test"  # what the recipe holds out; "train" measures on training sources


def evaluate_generator(
    recipe: Recipe, request: CardRequest, report: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """Measures the recipe's generator at its own settings and at others, standard augmentations, and real images.

    Returns:
        "rows" with a mapping a setting; "protocol", all that the numbers depend on; "warnings".

    Raises:
        UserError: if there is no generator, a parameter is unknown, data or judge cannot be had, or sources are too
            few.
    """
    if recipe.generator is None:
        raise UserError(f"{recipe.name}: has no generator; give a recipe with one, or generator='{{name: ...}}'")
    device = pick_device(recipe.train.device)
    if device.type == "cpu":
        set_threads(recipe.train.threads)
    train, held, measured_on = _splits(recipe, request.split)
    for note in (labels_note(train), left_out_note(train, held)):
        if note:
            report(note)
    generator = open_generator(recipe.generator, device)
    engine = VariantEngine(generator, [BATCH])
    points = _points(engine, request.vary)
    order = torch.randperm(len(held), generator=stream("quality-card", 0))
    rows: list[int] = order[: request.sources].tolist()
    if len(rows) < FEWEST:
        raise DataError(
            f"evaluate-generator: {len(rows)} held-out sources are too few; give {FEWEST} or more: more images, more "
            "of them held out (of a folder, dataset.test_fraction), or --split train, which measures on trained ones"
        )
    judge = load_judge(request.judge, train, device)
    report(f"judged by {judge.told or judge.name}")
    measures = _Measures(judge, train, held, rows, request.variants)
    count = request.variants
    result = [measures.of_real(), measures.of("standard augmentations", {}, *measures.of_views(recipe))]
    sources = Sources(engine, held, rows)
    sources.variants({}, 1, first=BATCH)  # the first batch is slow and not timed
    for number, (label, parameters) in enumerate(points, start=1):
        report(f"{label} ({number} of {len(points)})")
        made, spent = sources.variants(parameters, count, measures.seen)
        complete = engine.complete(parameters).parameters
        result.append(measures.of(label, dict(complete), torch.from_numpy(made), spent))
    warnings = [*measures.warnings, *_not_independent(judge, recipe), *_seen(recipe, request.split)]
    warnings += filter(None, [recipe.unsuited()])
    model = str(getattr(recipe.generator, "model", ""))
    return {
        "generator": {"name": generator.spec.name, "model": model, "fingerprint": generator.spec.fingerprint.hex()},
        "rows": result,
        "warnings": warnings,
        "protocol": {
            "measured_on": measured_on,
            "dataset": {
                "name": held.name,
                "image_size": held.image_size,
                "corrupt_left_out": len(held.skipped),
                "digest": dataset_digest(held),
            },
            "sources": len(rows),
            "variants_of_a_source": count,
            "images_a_set": len(rows) // 2,
            "sets": "frechet and prdc: variant 0 of half of the sources against the other half, real",
            "neighbours": NEIGHBOURS,
            "judge": judge.facts,
            "judge_dimensions": measures.dimensions,
            "label_judge": measures.label_judged_by,
            "train_images_compared": measures.train_images,
            "standard_augmentations": recipe.views.augmentation.of_view(0).model_dump(mode="json"),
            "batch": BATCH,
            "threads": torch.get_num_threads(),
            "device": str(device),
            "genssl": __version__,
        },
    }


def write(card: dict[str, Any], folder: Path) -> None:
    """Writes quality.json, quality.csv and quality.png into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in card["rows"] for key in row if key != "parameters"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, "parameters"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"parameters": json.dumps(row["parameters"])} for row in card["rows"])
    write_json(folder / "quality.json", card)
    write_atomically(folder / "quality.csv", lambda path: path.write_text(text.getvalue()))
    figure = draw_quality(card)
    write_atomically(folder / "quality.png", lambda path: figure.savefig(path, format="png"))


class _Measures:
    """Judges sets of variants of the same sources; what is of the real images alone is computed once."""

    def __init__(
        self, judge: Judge, train: ImageDataset, held: ImageDataset, rows: Sequence[int], variants: int
    ) -> None:
        self._encoder = FrozenEncoder(judge.module, judge.device)
        self._judge, self._variants = judge, variants
        self._held, self._rows = held, rows
        self._sources = self._encoder.encode_rows(held, rows)
        known = range(0, len(train), max(1, -(-len(train) // MAX_TRAIN)))
        self._train = self._encoder.encode_rows(train, known)
        self.train_images, self.dimensions = len(known), self._sources.shape[1]
        self._mean = self._train.mean(dim=0) if judge.centred else torch.zeros(self.dimensions)
        labels = [held.label(row) for row in rows]
        self._labels = LabelJudge(train, lambda known: self._encoder.encode_rows(train, known).numpy(), labels)
        learnt = self._labels.learnt_from
        self.label_judged_by = f"RBF-SVM on {learnt} real train images" if learnt else "no labels"
        half = len(rows) // 2
        warning = too_few(half, self.dimensions)
        self.warnings = [] if warning is None else [f"frechet: {warning}"]

    def of_real(self) -> dict[str, Any]:
        """Returns the row of the sources themselves; as diversity, that of as many unrelated real images."""
        unrelated = torch.stack([self._sources.roll(-shift, dims=0) for shift in range(self._variants)])
        return {
            "setting": "real images",
            "parameters": {},
            "label_agreement": self._labels.agreement(self._sources[None].numpy()),
            "cosine": None,
            "retrieval@1": None,
            **self._diversity(unrelated),
            **self._reality(self._sources[None]),
            "variants_per_second": None,
        }

    def seen(self, images: UInt8Array) -> Array:
        """Returns the features [B, D] of images uint8 [B, 3, S, S] of any size: what is kept of them."""
        sized = np.stack([resize_and_crop(image, self._held.image_size) for image in images])
        return self._encoder.encode(sized).numpy()

    def of_views(self, recipe: Recipe) -> tuple[torch.Tensor, float]:
        """Returns the features [V * N, D] of the recipe's standard views of the sources, and the seconds they took."""
        size, found, seconds = self._held.image_size, [], 0.0
        augment = Augmentations(recipe.views, size).real(0)
        for index in range(self._variants):
            drawn = augment.draw(len(self._rows), size, size, stream("quality-card", "augment", index))
            for start in range(0, len(self._rows), BATCH):  # all at once they would take gigabytes
                part = torch.arange(start, min(start + BATCH, len(self._rows)))
                images = np.stack([self._held.image(self._rows[row]) for row in part.tolist()])
                started = time.perf_counter()
                views = augment.apply(torch.from_numpy(images).float() / 255, drawn.of(part))
                seconds += time.perf_counter() - started
                found.append(self._encoder.encode((views * 255).round().to(torch.uint8)))
        return torch.cat(found), seconds

    def of(self, setting: str, parameters: Parameters, made: torch.Tensor, seconds: float) -> dict[str, Any]:
        """Returns the row of features [V * N, D] of images, all of variant 0 first, that took so many seconds."""
        features = made.reshape(self._variants, -1, self.dimensions)
        unit = F.normalize(self._sources - self._mean, dim=1)
        units = [F.normalize(one - self._mean, dim=1) for one in features]
        return {
            "setting": setting,
            "parameters": parameters,
            "label_agreement": self._labels.agreement(features.numpy()),
            "cosine": float(torch.stack([(one * unit).sum(dim=1) for one in units]).double().mean()),
            "retrieval@1": float(torch.cat([retrieved(unit, one) for one in units]).double().mean()),
            **self._diversity(features),
            **self._reality(features),
            "variants_per_second": len(made) / seconds,
        }

    def _diversity(self, features: torch.Tensor) -> dict[str, float]:
        groups = (features - self._mean).transpose(0, 1)
        return {
            "distance_within_source": distance_within(features.double().numpy()),
            "vendi_per_source": float(np.mean([vendi_score(group) for group in groups])),
        }

    def _reality(self, features: torch.Tensor) -> dict[str, float]:
        half = len(self._sources) // 2
        made, others = features[0, :half], self._sources[half : 2 * half]
        flat = features.flatten(0, 1)
        nearest = [torch.cdist(part, self._train).min(dim=1).values for part in torch.split(flat, 1024)]
        return {
            "frechet": frechet_distance(made, others),
            **asdict(prdc(others, made, k=NEIGHBOURS)),
            "nearest_train_distance": float(torch.cat(nearest).double().mean()),
        }


def _splits(recipe: Recipe, split: str) -> tuple[ImageDataset, ImageDataset, str]:
    train = load_dataset(recipe.dataset, "train")
    if split == "train":
        return train, train, "train (not held out)"
    fraction = recipe.train.validation_fraction
    if fraction > 0:
        rest, held = hold_out(train, fraction)
        return rest, held, f"validation ({fraction:g} of train)"
    return train, load_dataset(recipe.dataset, "test"), "test"


def _points(engine: VariantEngine, vary: dict[str, list[float]]) -> list[tuple[str, Parameters]]:
    """Returns label and parameters of every setting, the recipe's own first, none twice; checked before any work."""
    spec = engine.generator.spec
    for name in vary:
        if name not in spec.defaults:
            raise UserError(f"--vary {name}: {spec.name} has no such parameter{suggest(name, spec.defaults)}")
    if vary:
        varied: Sequence[Parameters] = [
            dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())
        ]
    else:
        varied = sweep_of(engine.generator).varied
    points: dict[bytes, tuple[str, Parameters]] = {}
    for parameters in ({}, *varied):
        told = ", ".join(f"{name} {value:g}" for name, value in parameters.items())
        points.setdefault(engine.complete(parameters).digest, (told or "the recipe's", parameters))
    return list(points.values())


def _not_independent(judge: Judge, recipe: Recipe) -> list[str]:
    """Warns if the judge is what the generator sees images with."""
    model = str(getattr(recipe.generator, "model", ""))
    if judge.encoder.rstrip("/") != model.rstrip("/"):
        return []
    return [f"the judge {judge.name} is the generator's own conditioner, which flatters it; name another with --judge"]


def _seen(recipe: Recipe, split: str) -> list[str]:
    if split == "train":
        return ["measured on training sources, as asked; a generator that copies them looks faithful"]
    model = str(getattr(recipe.generator, "model", ""))
    if recipe.train.validation_fraction > 0 and model.startswith("builtin:"):
        return [f"{model} was trained on the whole train split, so its validation part is not held out from it"]
    return []
