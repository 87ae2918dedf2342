"""Judges finished encoders on data sets: every evaluator, every data set, every encoder, in one table."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from genssl import __version__
from genssl.base.files import write_atomically, write_json
from genssl.base.versions import PACKAGES
from genssl.config.base import ComponentConfig
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.load import dataset_digest, left_out_note, load_dataset, of_size
from genssl.encoders.load import LoadedEncoder
from genssl.errors import UserError
from genssl.evaluators.base import EvaluationData
from genssl.evaluators.run import able, check, evaluate
from genssl.evaluators.splits import load_splits
from genssl.registry import EVALUATORS
from genssl.variants.in_process import GeneratedVariants

COLUMNS = ("encoder", "dataset", "evaluator", "metric", "value", "protocol")
PLACES = ("root", "test_root", "download")  # settings of a data set that say where it is, and not what it is
Report = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One number; rows of an equal protocol id can be compared."""

    encoder: str
    dataset: str
    evaluator: str
    metric: str
    value: float  # accuracies in 0..1
    protocol: str
    facts: dict[str, Any] = field(default_factory=dict)  # what the evaluator chose, how many images it saw


@dataclass
class Table:
    """All numbers of an evaluation."""

    rows: list[Row]
    protocols: dict[str, dict[str, Any]]  # by id, the settings of the evaluator and what the data are
    encoders: dict[str, dict[str, Any]]  # by name, where each came from

    def write(self, folder: Path) -> None:
        """Writes evaluation.csv and evaluation.json into a folder, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, column) for column in COLUMNS] for row in self.rows)
        write_atomically(folder / "evaluation.csv", lambda path: path.write_text(text.getvalue()))
        content = {
            "rows": [vars(row) for row in self.rows],
            "protocols": self.protocols,
            "encoders": self.encoders,
            "packages": {"genssl": __version__, **_versions()},
        }
        write_json(folder / "evaluation.json", content)


def transfer(
    encoders: Sequence[LoadedEncoder],
    evaluations: Iterable[tuple[Sequence[ComponentConfig], Sequence[ComponentConfig]]],
    device: torch.device,
    report: Report = lambda what: None,
    variants_of: Recipe | None = None,
    keep: Callable[[Table], object] = lambda table: None,
) -> Table:
    """Judges encoders.

    Args:
        encoders: with different names.
        evaluations: pairs of data sets and the evaluators that judge on each of them. No data sets: those of the
            encoders' own runs. No evaluators: those of the encoder's run, or kNN and a linear probe.
        device: where encoders and evaluators compute.
        report: is told what is being done.
        variants_of: whose generator makes the variants for all encoders; that of each encoder's own run otherwise.
        keep: is given the table whenever it has grown, so that what took hours is not lost with what follows.

    Raises:
        UserError: if a data set cannot be had, does not suffice for an evaluator, or there is none; before the first
            evaluator runs.
    """
    work, notes = [], list[str]()
    loaded: dict[str, EvaluationData] = {}  # data sets that several encoders share are read once
    for encoder in encoders:
        recipe = recipe_of(encoder)
        for datasets, evaluators in evaluations:
            own: list[ComponentConfig | None] = [None]
            for dataset in datasets or own:
                data, facts = _data(encoder, recipe, dataset, device, loaded)
                data = EvaluationData(data.train, data.test, data.test_name, _variants(variants_of or recipe, device))
                chosen, left_out = list(evaluators), None
                if chosen:  # named by the user, who is to know
                    check(chosen, data)
                else:
                    chosen, left_out = able(default_evaluators(recipe), data)
                if left_out:
                    report(f"{encoder.name}: {left_out}")
                if (note := left_out_note(data.train, data.test)) and note not in notes:
                    report(note)
                    notes.append(note)
                work.append((encoder, data, facts, chosen))
    table = Table([], {}, {encoder.name: encoder.source | _made_by(encoder, variants_of) for encoder in encoders})
    for encoder, data, facts, chosen in work:
        for group in _once_each(chosen):
            report(f"{encoder.name}: {', '.join(config.name for config in group)} on {facts['name']}")
            metrics, told = evaluate(group, encoder.module, data, device)
            for config in group:
                settings = {"evaluator": config.model_dump(mode="json"), "dataset": facts}
                protocol = protocol_id(settings)
                table.protocols[protocol] = settings
                prefix = f"{config.name}/"
                table.rows += [
                    Row(
                        encoder=encoder.name,
                        dataset=facts["name"],
                        evaluator=config.name,
                        metric=metric.removeprefix(prefix),
                        value=value,
                        protocol=protocol,
                        facts=told[config.name],
                    )
                    for metric, value in metrics.items()
                    if metric.startswith(prefix)
                ]
            keep(table)
    return table


def protocol_id(settings: dict[str, Any]) -> str:
    """Returns 8 hex digits: equal settings and data, equal id, whatever the encoder and the result."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def recipe_of(encoder: LoadedEncoder) -> Recipe | None:
    """Returns the recipe of the run that an encoder comes from, or None if it comes from elsewhere."""
    if encoder.source["kind"] != "run":
        return None
    path = Path(encoder.source["path"]).parent / "recipe.yaml"
    return load(Recipe, path) if path.exists() else None


def default_evaluators(recipe: Recipe | None) -> list[ComponentConfig]:
    """Returns the evaluators of a run, or kNN and a linear probe."""
    if recipe is not None and recipe.evaluate:
        return list(recipe.evaluate)
    return [EVALUATORS.config(name)() for name in ("knn", "linear_probe")]


def _data(
    encoder: LoadedEncoder,
    recipe: Recipe | None,
    dataset: ComponentConfig | None,
    device: torch.device,
    loaded: dict[str, EvaluationData],
) -> tuple[EvaluationData, dict[str, Any]]:
    """Returns the splits, and what they are: part of the protocol."""
    if dataset is None:
        if recipe is None:
            raise UserError(
                f"{encoder.name}: does not come from a run, so it has no data set of its own; name one: --dataset"
            )
        splits = load_splits(recipe.model_copy(update={"evaluate": default_evaluators(recipe)}))
        assert splits.evaluation is not None
        data, config = splits.evaluation, recipe.dataset
    else:
        # The encoder sees images of the size it was made for, unless the data set's block says another.
        config = dataset
        if encoder.image_size is not None and "image_size" not in dataset.model_fields_set:
            config = of_size(dataset, encoder.image_size)
        key = config.model_dump_json()
        if key not in loaded:
            loaded[key] = EvaluationData(load_dataset(config, "train"), load_dataset(config, "test"), "test")
        data = loaded[key]
    facts = {
        **{name: value for name, value in config.model_dump(mode="json").items() if name not in PLACES},
        "image_size": data.train.image_size,
        "tested_on": data.test_name,
        "train": {"images": len(data.train), "digest": dataset_digest(data.train)},
        "test": {"images": len(data.test), "digest": dataset_digest(data.test)},
    }
    return data, facts


def _made_by(encoder: LoadedEncoder, variants_of: Recipe | None) -> dict[str, Any]:
    """Returns which generator makes an encoder's variants, for the provenance."""
    recipe = variants_of or recipe_of(encoder)
    if recipe is None or recipe.generator is None:
        return {}
    return {"variants_by": recipe.generator.model_dump(mode="json")}


def _variants(recipe: Recipe | None, device: torch.device) -> GeneratedVariants | None:
    return None if recipe is None or recipe.generator is None else GeneratedVariants(recipe, device)


def _once_each(configs: Sequence[ComponentConfig]) -> Iterator[list[ComponentConfig]]:
    """Yields groups in which no evaluator's name stands twice, since results are named by it."""
    rest = list(configs)
    while rest:
        group = {config.name: config for config in reversed(rest)}  # the first of each name
        yield [config for config in rest if group[config.name] is config]
        rest = [config for config in rest if group[config.name] is not config]


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions
