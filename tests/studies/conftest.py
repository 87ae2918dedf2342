"""A study with everything that a report must cope with, and a browser to look at it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from browser import Browser, missing_browser
from PIL import Image

from genssl.studies.model import (
    ArmSummary,
    Control,
    Estimate,
    PaperCell,
    RunCost,
    RunSummary,
    StoreCost,
    Summary,
)
from genssl.studies.report import write_report

METRICS = ["linear_probe/top1", "knn/top1", "linear_probe/top1@10"]
SEEDS = [0, 1, 2]
IMAGES, STEPS, EPOCHS = 1437, 440, 40
T_95 = 4.302653  # Student's t for two degrees of freedom

# name, label, accuracy, distinct variants, generator calls, generator seconds, waiting seconds
ARMS = [
    ("none", "no variants", 0.9312, 0, 0, 0.0, 0.0),
    ("stored_1", "stored, K = 1", 0.9431, IMAGES, IMAGES, 1.1, 0.0),
    ("stored_3", "stored, K = 3", 0.9502, 3 * IMAGES, 3 * IMAGES, 3.3, 0.0),
    ("stored_10", "stored, K = 10", 0.9548, 10 * IMAGES, 10 * IMAGES, 11.0, 0.0),
    ("fresh", "online, fresh", 0.9561, 56320, 56320, 43.4, 21.9),
    ("budget", "online, budget < 25 % & reuse", 0.9524, 14080, 14080, 10.9, 0.4),
    ("again", "online, indices mod 10 over the stored variants (A/A)", 0.9548, 10 * IMAGES, 0, 0.0, 0.2),
    ("long", "no variants, in the wall-clock of online", 0.9371, 0, 0, 0.0, 0.0),
    ("once", "<b>one seed</b> & $x_1$", 0.9391, 2 * IMAGES, 2 * IMAGES, 2.2, 0.1),
]


def estimate(values: list[float]) -> Estimate:
    if len(values) == 1:
        return Estimate(mean=values[0], n=1)
    half = T_95 * stdev(values) / math.sqrt(len(values))
    return Estimate(mean=fmean(values), low=fmean(values) - half, high=fmean(values) + half, n=len(values))


def _runs(number: int) -> list[RunSummary]:
    name, _, accuracy, distinct, calls, device, stall = ARMS[number]
    noise = random.Random(name.replace("again", "stored_10"))
    stored = name.startswith("stored") or name == "once"
    epochs = EPOCHS + 37 if name == "long" else EPOCHS
    runs = []
    for seed in SEEDS[:1] if name == "once" else SEEDS:
        trainer = 26.0 * epochs / EPOCHS + noise.random()
        cost = RunCost(
            generator_calls=calls,
            generator_seconds=device,
            trainer_seconds=trainer,
            stall_seconds=stall,
            pregeneration_seconds=1.3 * device if stored else 0,
            wall_clock_seconds=trainer + stall + (1.3 * device if stored else 0),
            distinct_variants=distinct,
            views_from_variants=STEPS * 128 if distinct else 0,
            reused=42240 if name == "budget" else 0,
            store_bytes=260.0 * calls if stored else 0,
            bytes_received=0 if stored else 192.0 * calls,
        )
        values = {metric: accuracy - 0.01 * i + 0.004 * (noise.random() - 0.5) for i, metric in enumerate(METRICS)}
        ledger = {
            "variants_generated": 0 if stored else calls,
            "distinct_variants": distinct,
            "fresh_fraction": 0.25 if name == "budget" else 1.0,
            "stall_seconds": stall,
            "retries_away": 1,
            "a_count_of_tomorrow": 0.5,
        }
        runs.append(
            RunSummary(
                seed=seed,
                directory=f"runs/{name}/seed-{seed}",
                epochs=epochs,
                steps=STEPS * epochs // EPOCHS,
                metrics=values,
                cost=cost,
                ledger=ledger,
                seconds=trainer + stall + 4,
            )
        )
    return runs


def _paired(ours: list[RunSummary], theirs: list[RunSummary], metric: str) -> Estimate:
    other = {run.seed: run.metrics[metric] for run in theirs}
    return estimate([run.metrics[metric] - other[run.seed] for run in ours])


def make_study() -> Summary:
    runs = {arm[0]: _runs(number) for number, arm in enumerate(ARMS)}
    paper = {"none": PaperCell(value=61.84, source="Table <3>"), "stored_10": None}
    paper["stored_10"] = PaperCell(value=68.11, differences={"none": 6.27}, source="Table <3>")
    arms = []
    for name, label, *_ in ARMS:
        against = [] if name == "none" else ["fresh"] if name == "long" else ["none", "stored_10"]
        against = [other for other in against if other != name]
        arms.append(
            ArmSummary(
                name=name,
                label=label,
                note=f"Shows what {label} does." if name != "budget" else "",
                equal="wall_clock" if name == "long" else "steps",
                matched="fresh" if name == "long" else None,
                control_of="stored_10" if name == "again" else None,
                against=against,
                runs=runs[name],
                metrics={metric: estimate([run.metrics[metric] for run in runs[name]]) for metric in METRICS},
                differences={
                    other: {metric: _paired(runs[name], runs[other], metric) for metric in METRICS} for other in against
                },
                cost=RunCost(
                    **{cost: fmean(getattr(run.cost, cost) for run in runs[name]) for cost in RunCost.model_fields}
                ),
                paper=paper.get(name),
            )
        )
    return Summary(
        study="online-vs-offline",
        title="Online against offline variants: SimCLR on the digits, <small>",
        quick=False,
        metric=METRICS[0],
        metrics=METRICS,
        seeds=SEEDS,
        reference="none",
        arms=arms,
        equal_generator_calls=[["stored_10", "budget"]],
        stores=[
            StoreCost(
                directory="stores/unclip",
                generator="stable_unclip builtin:digits-unclip",
                variants_per_image=10,
                variants=10 * IMAGES,
                seconds=14.3,
                generator_seconds=11.0,
                bytes=260 * 10 * IMAGES,
            )
        ],
        controls={
            "a_a": Control(arm="again", of="stored_10", max_abs_difference=0.0, encoders_equal=True),
            "a_a_once": Control(arm="once", of="stored_1", max_abs_difference=0.0028, encoders_equal=False),
        },
        verdict=[
            "online, fresh against stored, K = 10, at equal optimiser steps: +0.13 points (95 % interval -0.61 to "
            "+0.87, 3 seeds, paired): no difference is shown; one of up to 0.87 points either way is not excluded.",
            "stored, K = 10 against no variants: +2.36 points (95 % interval +1.80 to +2.92, 3 seeds, paired): higher.",
            "Sentences may hold <i>markup</i>, which is text here.",
        ],
        cautions=["3 seeds are few; the intervals are wide for that reason alone.", "Wall-clock is of this machine."],
        seconds=1312.0,
        provenance={
            "genssl": "0.1.0",
            "packages": {"torch": "2.15.0", "numpy": "2.4.6"},
            "machine": {"system": "Linux", "cores": 2, "device": "cpu"},
            "dataset": {"name": "digits", "images": IMAGES, "digest": "61e6135d2dfcaf395f55d6f295894aed"},
            "variants": {
                "fresh": {"source": "online", "model": "builtin:digits-unclip", "note": "<script>alert(1)</script>"}
            },
        },
        recipe={"name": "simclr", "seed": 0, "dataset": {"name": "digits"}, "evaluate": [{"name": "knn", "k": 20}]},
        paper="top-1 of a linear probe on ImageNet (Table <3>)",
    )


@pytest.fixture(scope="session")
def study() -> Summary:
    """Nine arms and three seeds: one arm of one seed, a control that fails, labels with markup."""
    return make_study()


@pytest.fixture(scope="session")
def written(study: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that study with its report."""
    out = tmp_path_factory.mktemp("study")
    pixels = np.random.default_rng(0).integers(0, 255, (326, 380, 3), dtype=np.uint8)
    for arm in study.arms:
        folder = out / arm.runs[0].directory
        folder.mkdir(parents=True)
        if arm.name != "budget":  # a picture that is missing is no reason to have no report
            Image.fromarray(pixels).save(folder / "samples.png")
    write_report(out, study)
    return out


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium."""
    if reason := missing_browser():
        pytest.skip(reason)
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
