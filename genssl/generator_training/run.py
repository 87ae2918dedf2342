"""`genssl train-generator`: trains, measures on held-out images, and writes a generator folder with a model card."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from genssl import __version__
from genssl.base.devices import pick_device, set_threads
from genssl.base.files import claim, write_atomically, write_json
from genssl.base.ranks import ranks_now
from genssl.config.generator_recipes.base import FAMILIES, GeneratorRecipe
from genssl.config.generator_recipes.flow import FlowRecipe
from genssl.data.base import ImageDataset
from genssl.data.load import dataset_digest, hold_out, labels_note, left_out_note, load_dataset
from genssl.errors import ConfigError, UserError
from genssl.generator_training.loop import CHECKPOINT, Checkpoints, DivergedError, Loop, fit_batches
from genssl.generator_training.stage_progress import StageProgress
from genssl.generator_training.watching import Watch
from genssl.generators.base import Generator
from genssl.generators.configs import FlowConfig, GeneratorConfig
from genssl.generators.open import open_generator
from genssl.quality.measures import NOISES, Sweep, cell, columns, measure
from genssl.registry import GENERATORS
from genssl.training.stopping import Stopped, StopSignals

PUBLISHED = "published.json"  # in the unfinished training's folder, once the weights are in their place
AGAIN = "the same command"


def train_generator(recipe: GeneratorRecipe, folder: Path, console: Console, again: str = AGAIN) -> dict[str, Any]:
    """Trains the generator of a recipe, writes its folder, whole or not at all, and measures what was made.

    The folder is made beside its place, in `.NAME.partial`, which the same command takes up: a training that was
    killed goes on from its last checkpoint and ends with the same weights; Ctrl-C and SIGTERM save first. The weights
    are in their place before they are measured, and all that the same command does after that is to measure. Under
    torchrun (see `distributed.joined`) every rank calls this; the first one measures, writes and speaks.

    Args:
        recipe: what to train, and on what.
        folder: written; refused if it exists, unless all that it lacks is the measuring.
        console: for the progress.
        again: how the user goes on after an interruption, for messages.

    Returns:
        The measured quality, as quality.json holds it; nothing with `quality: none`, and on ranks other than the first.

    Raises:
        UserError: if the folder exists, sizes do not fit, the data set is not there, another process is at it, or an
            unfinished training of another recipe lies there.
    """
    ranks, partial = ranks_now(), folder.with_name(f".{folder.name}.partial")
    trained: bool = ranks.gather(folder.exists() and (partial / PUBLISHED).is_file())[0]
    if ranks.first and folder.exists() and not trained:
        raise UserError(f"{folder} exists already; give another folder with --out, or remove it")
    device = ranks.device(pick_device(recipe.device))
    if device.type == "cpu":
        set_threads(recipe.threads, among=ranks.local_size)
    data = _Data.load(recipe)
    for note in (labels_note(data.train), left_out_note(data.train, data.test)):
        if note:
            console.print(note, soft_wrap=True)
    quality: dict[str, Any] = {}
    with claim(partial) if ranks.first else nullcontext():
        resumed = ranks.first and _enter(partial, recipe, data.train)
        if not trained:
            if resumed:
                console.print(f"{partial}: an unfinished training of this recipe; it goes on where it was saved last")
            _publish(recipe, data, device, folder, resumed, console, again)
        if ranks.first:
            quality = _measured(recipe, data, device, folder, console, again)
            shutil.rmtree(partial, ignore_errors=True)
    ranks.end_together("generator written")
    return quality


def _publish(
    recipe: GeneratorRecipe,
    data: _Data,
    device: torch.device,
    folder: Path,
    resumed: bool,
    console: Console,
    again: str,
) -> None:
    """Trains, and puts the folder in its place. A signal ends the process after a step, which is saved."""
    ranks, partial = ranks_now(), folder.with_name(f".{folder.name}.partial")
    model, started = partial / "model", time.perf_counter()
    fitting, notes = fit_batches(recipe, len(data.train), ranks)
    for note in notes:
        console.print(note, soft_wrap=True)
    signals = StopSignals(breaks=False)
    try:
        with signals:
            config, seen = _train(fitting, data, device, model, console, lambda: signals.number is not None)
            seconds = time.perf_counter() - started
            if ranks.first:
                write_json(model / "card.json", _card(fitting, data.train, seconds, resumed) | seen)
                (model / "README.md").write_text(_readme(fitting, config.name, {}, seconds))
                for path in model.rglob("*.safetensors"):  # the hub library writes them readable by their owner alone
                    path.chmod(0o644)
                for path in model.glob(f".*{CHECKPOINT}"):
                    path.unlink()
                published = {"generator": config.model_dump(mode="json", exclude_unset=True), "seconds": seconds}
                write_json(partial / PUBLISHED, published | {"name": config.name})
                os.replace(model, folder)
                console.print(f"{folder}: written; use it with generator.model={folder}", soft_wrap=True)
    except Stopped as stopped:
        console.print(f"stopped after {stopped}; saved. Go on with: {again}", soft_wrap=True)
        ranks.end_together("stopped")
        signals.follow()
    except BaseException as error:
        # Without a checkpoint there is nothing to go on from: another rank may have ended this one before it came
        # to the same mistake. From one before the loss diverged, or with sizes that do not fit, it would go wrong
        # again; but a file that could not be read may be there next time.
        vain = isinstance(error, ConfigError | DivergedError) or not any(model.glob(f".*{CHECKPOINT}"))
        if ranks.first and vain:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if signals.number is not None:  # it came after the last step
        if ranks.first:
            console.print(f"stopped before the measuring. Measure with: {again}", soft_wrap=True)
        signals.follow()


def _measured(
    recipe: GeneratorRecipe, data: _Data, device: torch.device, folder: Path, console: Console, again: str
) -> dict[str, Any]:
    """Measures the generator that is in its place, and adds what was found to its folder."""
    if recipe.quality == "none":
        return {}
    partial = folder.with_name(f".{folder.name}.partial")
    published = json.loads((partial / PUBLISHED).read_text())
    block = published["generator"] | {"name": published["name"], "model": str(folder)}
    config = GENERATORS.config(published["name"]).model_validate(block)
    try:
        with StageProgress(console, {}) as progress:
            settings = data.train, data.test, data.measured_on
            report, effort = progress.measuring, recipe.quality
            quality = measure(open_generator(config, device), *settings, effort=effort, report=report)
            if (teacher := _teacher(recipe, partial, device)) is not None:
                steps = {"num_inference_steps": teacher.spec.defaults["num_inference_steps"]}
                sweep = Sweep(steps, NOISES)
                quality["teacher"] = measure(teacher, *settings, sweep, effort=effort, report=report)
    except BaseException:
        console.print(
            f"{folder}: the weights are whole; they have not been measured. Measure with: {again} (or leave it out, "
            "with quality=none)",
            soft_wrap=True,
        )
        raise
    write_json(folder / "quality.json", quality)
    text = _readme(recipe, config.name, quality, published["seconds"])
    write_atomically(folder / "README.md", lambda path: path.write_text(text))
    return quality


@dataclass(frozen=True)
class _Data:
    """What is trained on, and what is measured on; `held` is the part of train that is held out, if one is."""

    train: ImageDataset
    test: ImageDataset
    held: ImageDataset | None
    measured_on: str

    @classmethod
    def load(cls, recipe: GeneratorRecipe) -> _Data:
        train = load_dataset(recipe.dataset, "train")
        if recipe.validation_fraction == 0:
            return cls(train, load_dataset(recipe.dataset, "test"), None, "test")
        train, held = hold_out(train, recipe.validation_fraction)
        chosen = ", which chose the weights too" if recipe.monitor and recipe.monitor.patience else ""
        return cls(train, held, held, f"validation ({recipe.validation_fraction:g} of train{chosen})")


def _train(
    recipe: GeneratorRecipe,
    data: _Data,
    device: torch.device,
    model: Path,
    console: Console,
    asked_to_stop: Callable[[], bool],
) -> tuple[GeneratorConfig, dict[str, Any]]:
    """Trains, writes the model's files, and returns the config that loads them and what the card says of the way."""
    ranks, watch = ranks_now(), None
    train_and_save = FAMILIES[recipe.family].load_trainer()
    with StageProgress(console, _batch_sizes(recipe)) as progress:
        if recipe.monitor is not None:
            source = data.train if data.held is None else data.held
            say = progress.say if ranks.first else (lambda line: None)
            watch = Watch(recipe.monitor, source, device, recipe.seed, model, ranks, say)
        loop = Loop(
            device,
            Checkpoints(model, ranks=ranks),
            progress,
            ranks,
            recipe.precision,
            recipe.channels_last,
            recipe.accumulate,
            watch,
            asked_to_stop,
        )
        config: GeneratorConfig = train_and_save(recipe, data.train, loop, model)
    return config, {} if watch is None else {"progress": watch.facts() | {"held_out": data.held is not None}}


def _batch_sizes(recipe: GeneratorRecipe) -> dict[str, int]:
    """Returns the images a step of every stage."""
    sections = {name: getattr(getattr(recipe, name), "batch_size", None) for name in type(recipe).model_fields}
    sizes = {name.replace("_", " "): size for name, size in sections.items() if size is not None}
    return {"icgan" if stage == "adversarial" else stage: size for stage, size in sizes.items()}


def _teacher(recipe: GeneratorRecipe, partial: Path, device: torch.device) -> Generator | None:
    """Returns the flow that a student was distilled from, with its steps and guidance; None for what is no student."""
    if not isinstance(recipe, FlowRecipe) or recipe.distill is None:
        return None
    from genssl.generator_training.flow import TEACHER  # what made it has loaded diffusers by now

    config = recipe.distill
    settings = {"num_inference_steps": config.teacher_steps, "guidance_scale": config.guidance_scale}
    return open_generator(FlowConfig(model=config.teacher or str(partial / TEACHER), **settings), device)


def _enter(partial: Path, recipe: GeneratorRecipe, train: ImageDataset) -> bool:
    """Makes the folder of an unfinished training, or checks that the one there is of the same recipe; says which."""
    note = partial / "recipe.json"
    (partial / "model").mkdir(exist_ok=True)
    # How it is measured may be decided otherwise afterwards.
    made_by = recipe.model_dump(mode="json", exclude={"quality"})
    wanted = made_by | {"genssl": __version__, "images": dataset_digest(train)}
    if note.is_file():
        if json.loads(note.read_text()) != wanted:
            raise UserError(
                f"{partial} holds an unfinished training of another recipe or of other images; remove it, or give "
                "another --out"
            )
        return True
    write_json(note, wanted)
    return False


def _card(recipe: GeneratorRecipe, train: ImageDataset, seconds: float, resumed: bool) -> dict[str, Any]:
    return {
        "licence": recipe.licence,
        "trained_by": f"genssl {__version__}, torch {torch.__version__}",
        "training_seconds": round(seconds),
        **({"resumed": True} if resumed else {}),  # then the seconds are of the last process alone
        "dataset": {
            "name": train.name,
            "split": "train",
            "images": len(train),
            "corrupt_left_out": len(train.skipped),
            "labels_used": False,
        },
        "recipe": recipe.model_dump(mode="json"),
    }


def _readme(recipe: GeneratorRecipe, generator: str, quality: dict[str, Any], seconds: float) -> str:
    if not quality:
        return _about(recipe, generator, seconds) + "\nNot measured.\n"
    teacher = quality.get("teacher")
    beside = "" if teacher is None else f"\nIts teacher at {_fixed(teacher).lstrip(', ')}:\n\n{_markdown(teacher)}\n"
    return f"""{_about(recipe, generator, seconds)}
Measured on {quality["sources"]} held-out sources ({quality["measured_on"]}), {quality["variants_per_source"]} variants
each{_fixed(quality)}, {quality["threads"]} CPU threads, batches of {quality["batch"]}; features are
{quality["features"]}.
Label agreement: {quality["label_agreement_by"]}.
Distance within a source: mean L2 between two variants, grey values in 0..1; two random real images are
{quality["distance_between_real_images"]} apart.

{_markdown(quality)}
{beside}"""


def _about(recipe: GeneratorRecipe, generator: str, seconds: float) -> str:
    run = getattr(getattr(recipe, "conditioner", None), "run", None)
    others = "no other data, no pretrained weights" if run is None else f"the encoder is that of the run `{run.name}`"
    return f"""# {recipe.name}

{FAMILIES[recipe.family].about}
Trained by genssl {__version__} in {seconds:.0f} s.

- **Remade by** `genssl train-generator RECIPE --out DIR`; the recipe stands in `card.json`.
- **Data**: the train split of `{recipe.dataset.name}`; no labels, {others}.
- **Licence**: {recipe.licence}.
- **Use**: `generator: {{name: {generator}, model: DIR}}`.
"""


def _fixed(quality: dict[str, Any]) -> str:
    return "".join(f", {name} {value:g}" for name, value in quality["fixed"].items())


def _markdown(quality: dict[str, Any]) -> str:
    names = columns(quality)
    table = [names, ["---"] * len(names)] + [[cell(row[key]) for key in row] for row in quality["settings"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)
