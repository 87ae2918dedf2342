"""`genssl train-generator`: trains, measures on held-out images, and writes a generator folder with a model card."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from genssl import __version__
from genssl.config.flow_recipe import FlowRecipe
from genssl.config.generator_recipe import FAMILIES, GeneratorRecipe
from genssl.data.base import ImageDataset
from genssl.data.load import hold_out, left_out_note, load_dataset
from genssl.errors import ConfigError, UserError
from genssl.generators.base import Generator
from genssl.generators.configs import FlowConfig, GeneratorConfig
from genssl.generators.opening import open_generator
from genssl.runtime import pick_device, set_threads
from genssl.training.distributed import ranks_now
from genssl.training.files import write_json
from genssl.training.fitting import CHECKPOINT, Checkpoints, DivergedError, Loop
from genssl.training.generator_quality import NOISES, Sweep, cell, columns, measure
from genssl.training.lock import claim
from genssl.training.provenance import dataset_digest
from genssl.training.watching import Watch


def train_generator(recipe: GeneratorRecipe, folder: Path, console: Console) -> dict[str, Any]:
    """Trains the generator of a recipe and writes its folder, whole or not at all.

    The folder is made beside its place, in `.NAME.partial`. A process that is killed leaves that, and the same command
    takes the training up from the last checkpoint; it ends with the same weights. Under torchrun (see
    `distributed.joined`) every rank calls this; the first one measures, writes and speaks.

    Args:
        recipe: what to train, and on what.
        folder: written; refused if it exists.
        console: for the progress.

    Returns:
        The measured quality, as quality.json holds it; nothing on ranks other than the first.

    Raises:
        UserError: if the folder exists, sizes do not fit, the data set is not there, another process is at it, or an
            unfinished training of another recipe lies there.
    """
    ranks = ranks_now()
    if ranks.first and folder.exists():
        raise UserError(f"{folder} exists already; give another folder with --out, or remove it")
    device = ranks.device(pick_device(recipe.device))
    if device.type == "cpu":
        set_threads(recipe.threads, among=ranks.local_size)
    data = _Data.load(recipe)
    if note := left_out_note(data.train, data.test):
        console.print(note, soft_wrap=True)
    partial = folder.with_name(f".{folder.name}.partial")
    model = partial / "model"
    with claim(partial) if ranks.first else nullcontext():
        resumed = ranks.first and _enter(partial, recipe, data.train)
        if resumed:
            console.print(f"{partial}: an unfinished training of this recipe; it goes on where it was saved last")
        try:
            started = time.perf_counter()
            config, seen = _train(recipe, data, device, model, console)
            seconds = time.perf_counter() - started
            if not ranks.first:
                ranks.end_together("generator written")
                return {}
            write_json(model / "card.json", _card(recipe, data.train, seconds, resumed) | seen)
            with console.status("measuring what was made"):
                quality = measure(open_generator(config, device), data.train, data.test, data.measured_on)
                if (teacher := _teacher(recipe, partial, device)) is not None:
                    steps = {"num_inference_steps": teacher.spec.defaults["num_inference_steps"]}
                    sweep = Sweep(steps, NOISES)
                    quality["teacher"] = measure(teacher, data.train, data.test, data.measured_on, sweep)
            write_json(model / "quality.json", quality)
            (model / "README.md").write_text(_readme(recipe, config.name, quality, seconds))
            for path in model.rglob("*.safetensors"):  # the hub library writes them readable by their owner alone
                path.chmod(0o644)
            for path in model.glob(f".*{CHECKPOINT}"):
                path.unlink()
            os.replace(model, folder)
        except BaseException as error:
            # Without a checkpoint there is nothing to go on from: another rank may have ended this one before it came
            # to the same mistake. From one before the loss diverged, or with sizes that do not fit, it would go wrong
            # again; but a file that could not be read may be there next time.
            again = isinstance(error, ConfigError | DivergedError) or not any(model.glob(f".*{CHECKPOINT}"))
            if ranks.first and again:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)
    ranks.end_together("generator written")
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
    recipe: GeneratorRecipe, data: _Data, device: torch.device, model: Path, console: Console
) -> tuple[GeneratorConfig, dict[str, Any]]:
    """Trains, writes the model's files, and returns the config that loads them and what the card says of the way."""
    ranks, watch = ranks_now(), None
    train_and_save = FAMILIES[recipe.family].load_trainer()
    with _Progress(console) as progress:
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
        )
        config: GeneratorConfig = train_and_save(recipe, data.train, loop, model)
    return config, {} if watch is None else {"progress": watch.facts() | {"held_out": data.held is not None}}


def _teacher(recipe: GeneratorRecipe, partial: Path, device: torch.device) -> Generator | None:
    """Returns the flow that a student was distilled from, with its steps and guidance; None for what is no student."""
    if not isinstance(recipe, FlowRecipe) or recipe.distill is None:
        return None
    from genssl.training.flow import TEACHER  # what made it has loaded diffusers by now

    config = recipe.distill
    settings = {"num_inference_steps": config.teacher_steps, "guidance_scale": config.guidance_scale}
    return open_generator(FlowConfig(model=config.teacher or str(partial / TEACHER), **settings), device)


class _Progress:
    """A bar a stage on a terminal, five lines a stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._bar: Progress | None = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *details: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        if not self._console.is_terminal:
            if step % max(1, steps // 5) == 0:
                self._console.print(f"{stage}: step {step}/{steps}, loss {loss:.4f}")
            return
        if stage != self._stage:
            self.__exit__()
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task(stage, total=steps, completed=step - 1, loss=loss)
            self._bar.start()
            self._stage = stage
        assert self._bar is not None
        self._bar.update(self._bar.task_ids[0], completed=step, loss=loss)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        (self._console if self._bar is None else self._bar.console).print(line, soft_wrap=True)


def _enter(partial: Path, recipe: GeneratorRecipe, train: ImageDataset) -> bool:
    """Makes the folder of an unfinished training, or checks that the one there is of the same recipe; says which."""
    note = partial / "recipe.json"
    wanted = recipe.model_dump(mode="json") | {"genssl": __version__, "images": dataset_digest(train)}
    if note.is_file():
        if json.loads(note.read_text()) != wanted:
            raise UserError(
                f"{partial} holds an unfinished training of another recipe or of other images; remove it, or give "
                "another --out"
            )
        return True
    (partial / "model").mkdir(exist_ok=True)
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
    teacher = quality.get("teacher")
    beside = "" if teacher is None else f"\nIts teacher at {_fixed(teacher).lstrip(', ')}:\n\n{_markdown(teacher)}\n"
    run = getattr(getattr(recipe, "conditioner", None), "run", None)
    others = "no other data, no pretrained weights" if run is None else f"the encoder is that of the run `{run.name}`"
    return f"""# {recipe.name}

{FAMILIES[recipe.family].about}
Trained by genssl {__version__} in {seconds:.0f} s.

- **Remade by** `genssl train-generator RECIPE --out DIR`; the recipe stands in `card.json`.
- **Data**: the train split of `{recipe.dataset.name}`; no labels, {others}.
- **Licence**: {recipe.licence}.
- **Use**: `generator: {{name: {generator}, model: DIR}}`.

Measured on {quality["sources"]} held-out sources ({quality["measured_on"]}), {quality["variants_per_source"]} variants
each{_fixed(quality)}, {quality["threads"]} CPU threads, batches of {quality["batch"]}.
Label agreement: {quality["label_agreement_by"]}.
Distance within a source: mean L2 between two variants, grey values in 0..1; two random real images are
{quality["distance_between_real_images"]} apart.

{_markdown(quality)}
{beside}"""


def _fixed(quality: dict[str, Any]) -> str:
    return "".join(f", {name} {value:g}" for name, value in quality["fixed"].items())


def _markdown(quality: dict[str, Any]) -> str:
    names = columns(quality)
    table = [names, ["---"] * len(names)] + [[cell(row[key]) for key in row] for row in quality["settings"]]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)
