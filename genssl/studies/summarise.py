"""From finished runs to the summary of a study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from genssl.config.recipe import Recipe
from genssl.config.study import LoadedArm, LoadedStudy
from genssl.evaluators.units import is_detail
from genssl.studies.model import ArmSummary, Control, Estimate, RunCost, RunSummary, Summary
from genssl.studies.paper import paper_cell, paper_says
from genssl.studies.runs import estimate, paired_difference
from genssl.studies.stores import StoreShare, StudyStores
from genssl.studies.verdict import cautions, verdict

SAME_CALLS = 0.1  # part by which numbers of generator calls that count as equal may differ


@dataclass(frozen=True)
class StudyRun:
    """One finished run of a study: an arm at a seed."""

    arm: str
    seed: int
    directory: Path  # relative to the study's folder
    recipe: Recipe
    results: dict[str, Any]  # of results.json
    cost: RunCost  # with the arm's share of stored variants
    encoder: str  # a digest of its trained weights

    @property
    def metrics(self) -> dict[str, float]:
        """What the evaluators measured, without spreads within an evaluator."""
        return {name: value for name, value in self.results["metrics"].items() if not is_detail(name)}


def run_cost(results: dict[str, Any], share: StoreShare | None) -> RunCost:
    """Returns what a run cost, together with the stored variants that it may draw."""
    ledger = results["ledger"]
    views = ("variants_generated", "variants_from_store", "variants_reused")
    before = share.seconds if share else 0.0
    return RunCost(
        generator_calls=ledger["variants_computed"] + (share.variants if share else 0),
        generator_seconds=ledger["generator_seconds"] + (share.generator_seconds if share else 0.0),
        trainer_seconds=ledger["trainer_seconds"],
        stall_seconds=ledger["stall_seconds"],
        pregeneration_seconds=before,
        wall_clock_seconds=before + ledger["trainer_seconds"] + ledger["stall_seconds"],
        distinct_variants=ledger["distinct_variants"],
        views_from_variants=sum(ledger[name] for name in views),
        reused=ledger["variants_reused"],
        real_instead=ledger["fallbacks_to_real"],
        store_bytes=share.bytes if share else 0,
        bytes_received=ledger["bytes_received"],
    )


def summarise(
    loaded: LoadedStudy,
    finished: dict[tuple[str, int], StudyRun],
    stores: StudyStores,
    replaced: Sequence[str] = (),
) -> Summary:
    """Returns the summary of a study from its finished runs by arm and seed; `replaced` says what was set aside."""
    study, seeds = loaded.study, loaded.seeds
    of_arms = {
        item.arm.name: [finished[item.arm.name, seed] for seed in seeds if (item.arm.name, seed) in finished]
        for item in loaded.arms
    }
    compared = [item for item in loaded.arms if len(of_arms[item.arm.name]) == len(seeds)]
    by_arm = {item.arm.name: of_arms[item.arm.name] for item in compared}
    reference = by_arm[study.reference][0]
    metrics = [study.metric, *(name for name in reference.metrics if name != study.metric)]
    arms = [_arm(item, by_arm, metrics, loaded) for item in compared]
    left_out = [
        f"{item.arm.label or item.arm.name} is left out: the wall-clock of {item.arm.wall_clock_of} was too short for "
        "it at some seed."
        for item in loaded.arms
        if item.arm.name not in by_arm
    ]
    stored = stores.costs([item.recipe for item in loaded.arms if item.stored_variants])
    first = reference.results["provenance"]
    draft = Summary(
        study=study.name,
        title=study.title or study.name,
        quick=loaded.quick,
        metric=study.metric,
        metrics=metrics,
        seeds=seeds,
        reference=study.reference,
        arms=arms,
        equal_generator_calls=_equal_calls(arms),
        stores=stored,
        controls=_controls(loaded, by_arm),
        seconds=round(
            sum(run.results["seconds"] for run in finished.values()) + sum(cost.seconds for cost in stored), 1
        ),
        provenance={name: first[name] for name in ("genssl", "packages", "python", "machine", "dataset")}
        | {"protocol": reference.results["protocol"], "variants": _variants(by_arm)}
        | ({"run_anew": list(replaced)} if replaced else {}),
        recipe=loaded.base.model_dump(mode="json"),
        paper=paper_says([item.arm.paper for item in loaded.arms if item.arm.paper]),
    )
    return draft.model_copy(update={"verdict": verdict(draft, study.headline), "cautions": cautions(draft) + left_out})


def _arm(item: LoadedArm, by_arm: dict[str, list[StudyRun]], metrics: Sequence[str], loaded: LoadedStudy) -> ArmSummary:
    arm, runs = item.arm, by_arm[item.arm.name]
    against = [name for name in loaded.against(arm) if name in by_arm]  # one may have been left out
    differences: dict[str, dict[str, Estimate]] = {}
    for other in against:
        pairs = {
            metric: paired_difference(*({run.seed: run.metrics[metric] for run in of} for of in (runs, by_arm[other])))
            for metric in metrics
        }
        differences[other] = {metric: found for metric, found in pairs.items() if found is not None}
    return ArmSummary(
        name=arm.name,
        label=arm.label or arm.name,
        note=arm.note,
        equal="wall_clock" if arm.wall_clock_of else "steps",
        matched=arm.wall_clock_of,
        control_of=arm.control_of,
        against=against,
        runs=[_run(run) for run in runs],
        metrics={metric: estimate([run.metrics[metric] for run in runs]) for metric in metrics},
        differences=differences,
        cost=RunCost(**{name: fmean(getattr(run.cost, name) for run in runs) for name in RunCost.model_fields}),
        paper=paper_cell(arm, {name: loaded.arm(name).arm for name in against}),
    )


def _run(run: StudyRun) -> RunSummary:
    epochs = run.recipe.train.epochs
    images = run.results["provenance"]["dataset"]["images"]
    return RunSummary(
        seed=run.seed,
        directory=str(run.directory),
        epochs=epochs,
        steps=epochs * (images // run.recipe.train.batch_size),
        metrics=run.metrics,
        cost=run.cost,
        ledger=run.results["ledger"],
        seconds=run.results["seconds"],
    )


def _equal_calls(arms: Sequence[ArmSummary]) -> list[list[str]]:
    """Returns groups of arms of equal steps that made about the same number of variants, each group largest first."""
    calling = sorted(
        (arm for arm in arms if arm.equal == "steps" and arm.control_of is None and arm.cost.generator_calls > 0),
        key=lambda arm: -arm.cost.generator_calls,
    )
    groups: list[list[ArmSummary]] = []
    for arm in calling:
        if groups and groups[-1][0].cost.generator_calls * (1 - SAME_CALLS) <= arm.cost.generator_calls:
            groups[-1].append(arm)
        else:
            groups.append([arm])
    return [[arm.name for arm in group] for group in groups if len(group) > 1]


def _controls(loaded: LoadedStudy, by_arm: dict[str, list[StudyRun]]) -> dict[str, Control]:
    controls = {}
    for item in loaded.arms:
        if item.arm.control_of is None:
            continue
        pairs = list(zip(by_arm[item.arm.name], by_arm[item.arm.control_of], strict=True))
        apart = {
            name: max(abs(ours.metrics[name] - theirs.metrics[name]) for ours, theirs in pairs)
            for name in pairs[0][0].metrics
        }
        metric = max(apart, key=lambda name: apart[name])
        largest = apart[metric]
        key = "a_a" if "a_a" not in controls else f"a_a_{item.arm.name}"
        controls[key] = Control(
            arm=item.arm.name,
            of=item.arm.control_of,
            max_abs_difference=largest,
            metric=metric if largest else "",
            encoders_equal=all(ours.encoder == theirs.encoder for ours, theirs in pairs),
        )
    return controls


def _variants(by_arm: dict[str, list[StudyRun]]) -> dict[str, Any]:
    """Returns, by arm, where its variants came from; the contents of a store's manifest would fill pages."""
    facts = {name: runs[0].results["provenance"]["variants"] for name, runs in by_arm.items()}
    return {name: {key: fact for key, fact in one.items() if key != "store"} for name, one in facts.items()}
