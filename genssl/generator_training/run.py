"""`genssl train-generator`: trains, measures on held-out images, and writes a generator folder with a model card."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from genssl import __version__
from genssl.base.devices import pick_device, set_threads
from genssl.base.files import claim, write_atomically, write_json
from genssl.base.ranks import ranks_now
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.data.base import ImageDataset
from genssl.data.load import dataset_digest, hold_out, labels_note, left_out_note, load_dataset
from genssl.errors import ConfigError, UserError
from genssl.generator_training.family import GeneratorTraining, fit_batches
from genssl.generator_training.loop import CHECKPOINT, Checkpoints, DivergedError, Loop
from genssl.generator_training.stage_progress import StageProgress
from genssl.generator_training.watching import Watch
from genssl.generators.configs import GeneratorConfig
from genssl.generators.open import open_generator
from genssl.quality.measures import NOISES, Sweep, cell, columns, measure
from genssl.registry import GENERATORS, TRAINABLE
from genssl.training.stopping import Stopped, StopSignals

PUBLISHED = "published.json"  # in the unfinished training's folder, once the weights are in their place
AGAIN = "the same command"


def train_generator(recipe: GeneratorRecipe, folder: Path, console: Console, again: str = AGAIN) -> dict[str, Any]:
    """Trains the generator of a recipe, writes its folder, whole or not at all, and measures what was made.

    The folder is made beside its place, in `.NAME.partial`, which the same command takes up: a training that was
    killed goes on from its last checkpoint and ends with the same weights; Ctrl-C and SIGTERM save first. The weights
    are in their place before they are measured, and all that the same command does after that is to measure. Under
    torchrun (see `genssl.base.ranks`) every rank calls this; the first one measures, writes and speaks.

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
    work = _Training(recipe, folder, partial, console, again)
    quality: dict[str, Any] = {}
    with claim(partial) if ranks.first else nullcontext():
        resumed = ranks.first and work.enter()
        if not trained:
            if resumed:
                work.say(f"{partial}: an unfinished training of this recipe; it goes on where it was saved last")
            work.publish(resumed=resumed)
        if ranks.first:
            quality = work.measured()
            shutil.rmtree(partial, ignore_errors=True)
    ranks.end_together("generator written")
    return quality


class _Training:
    """One training from data to a measured folder; see `train_generator`."""

    def __init__(self, recipe: GeneratorRecipe, folder: Path, partial: Path, console: Console, again: str) -> None:
        self._ranks = ranks_now()
        self._recipe, self._folder, self._partial, self._console, self._again = recipe, folder, partial, console, again
        self._family: type[GeneratorTraining[Any]] = TRAINABLE.get(recipe.family)
        self._device = self._ranks.device(pick_device(recipe.device))
        if self._device.type == "cpu":
            set_threads(recipe.threads, among=self._ranks.local_size)
        # --- data: what is trained on, and what is measured on ---
        train = load_dataset(recipe.dataset, "train")
        self._held: ImageDataset | None = None  # part of train that is held out
        if recipe.validation_fraction == 0:
            self._train, self._test, self._measured_on = train, load_dataset(recipe.dataset, "test"), "test"
        else:
            self._train, self._test = hold_out(train, recipe.validation_fraction)
            self._held = self._test
            chosen = ", which chose the weights too" if recipe.monitor and recipe.monitor.patience else ""
            self._measured_on = f"validation ({recipe.validation_fraction:g} of train{chosen})"
        for note in (labels_note(self._train), left_out_note(self._train, self._test)):
            if note:
                self.say(note)

    def say(self, line: str) -> None:
        """Prints a line, not wrapped: a command in it is there to be copied."""
        self._console.print(line, soft_wrap=True)

    def enter(self) -> bool:
        """Makes the folder of an unfinished training, or checks that the one there is of the same recipe.

        Returns whether there was one.
        """
        note = self._partial / "recipe.json"
        (self._partial / "model").mkdir(exist_ok=True)
        # How it is measured may be decided otherwise afterwards.
        made_by = self._recipe.model_dump(mode="json", exclude={"quality"})
        expected = made_by | {"images": dataset_digest(self._train)}
        if note.is_file():
            # Which version began it does not matter: a training goes on as it would have gone on there.
            if {key: value for key, value in json.loads(note.read_text()).items() if key != "genssl"} != expected:
                raise UserError(
                    f"{self._partial} holds an unfinished training of another recipe or of other images; remove it, or "
                    "give another --out"
                )
            return True
        write_json(note, expected | {"genssl": __version__})
        return False

    def publish(self, *, resumed: bool) -> None:
        """Trains, and puts the folder in its place. A signal ends the process after a step, which is saved."""
        model, started = self._partial / "model", time.perf_counter()
        recipe, notes = fit_batches(self._recipe, len(self._train), self._ranks)
        for note in notes:
            self.say(note)
        signals = StopSignals(breaks=False)
        try:
            with signals:
                config, facts = self._fit(recipe, model, signals)
                seconds = time.perf_counter() - started
                if config is not None:  # on the first rank
                    write_json(model / "card.json", _card(recipe, self._train, seconds, resumed) | facts)
                    (model / "README.md").write_text(_readme(recipe, self._family.about, config.name, {}, seconds))
                    for path in model.rglob("*.safetensors"):  # the hub library writes them for their owner alone
                        path.chmod(0o644)
                    for path in model.glob(f".*{CHECKPOINT}"):
                        path.unlink()
                    block = config.model_dump(mode="json", exclude_unset=True)
                    write_json(self._partial / PUBLISHED, {"generator": block, "seconds": seconds, "name": config.name})
                    os.replace(model, self._folder)
                    self.say(f"{self._folder}: written; use it with generator.model={self._folder}")
        except Stopped as stopped:
            self.say(f"stopped after {stopped}; saved. Go on with: {self._again}")
            self._ranks.end_together("stopped")
            signals.follow()
        except BaseException as error:
            # Without a checkpoint there is nothing to go on from: another rank may have ended this one before it came
            # to the same mistake. From one before the loss diverged, or with sizes that do not fit, it would go wrong
            # again; but a file that could not be read may be there next time.
            vain = isinstance(error, ConfigError | DivergedError) or not any(model.glob(f".*{CHECKPOINT}"))
            if self._ranks.first and vain:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        if signals.number is not None:  # it came after the last step
            if self._ranks.first:
                self.say(f"stopped before the measuring. Measure with: {self._again}")
            signals.follow()

    def _fit(
        self, recipe: GeneratorRecipe, model: Path, signals: StopSignals
    ) -> tuple[GeneratorConfig | None, dict[str, Any]]:
        """Trains and writes the model's files; returns the config that loads them, and what the card says of the way.

        The config is None on ranks other than the first.
        """
        ranks, watch = self._ranks, None
        with StageProgress(self._console) as progress:
            if recipe.monitor is not None:
                source = self._train if self._held is None else self._held
                say = progress.say if ranks.first else (lambda line: None)
                watch = Watch(recipe.monitor, source, self._device, recipe.seed, model, ranks, say)
            loop = Loop(
                self._device,
                Checkpoints(model, ranks=ranks),
                progress,
                ranks,
                recipe.precision,
                recipe.channels_last,
                recipe.accumulate,
                watch,
                lambda: signals.number is not None,
            )
            config = self._family(recipe, self._train, loop, model).run()
        return config, {} if watch is None else {"progress": watch.facts() | {"held_out": self._held is not None}}

    def measured(self) -> dict[str, Any]:
        """Measures the generator that is in its place, and adds what was found to its folder."""
        recipe, folder = self._recipe, self._folder
        if recipe.quality == "none":
            return {}
        published = json.loads((self._partial / PUBLISHED).read_text())
        block = published["generator"] | {"name": published["name"], "model": str(folder)}
        config = GENERATORS.config(published["name"]).model_validate(block)
        try:
            with StageProgress(self._console) as progress:
                settings = self._train, self._test, self._measured_on
                report, effort = progress.measuring, recipe.quality
                generator = open_generator(config, self._device)
                quality = measure(generator, *settings, effort=effort, report=report)
                if (teacher := self._family.teacher(recipe, self._partial)) is not None:
                    generator = open_generator(teacher, self._device)
                    sweep = Sweep({"num_inference_steps": generator.spec.defaults["num_inference_steps"]}, NOISES)
                    quality["teacher"] = measure(generator, *settings, sweep, effort=effort, report=report)
        except BaseException:
            self.say(
                f"{folder}: the weights are whole; they have not been measured. Measure with: {self._again} (or leave "
                "it out, with quality=none)"
            )
            raise
        write_json(folder / "quality.json", quality)
        text = _readme(recipe, self._family.about, config.name, quality, published["seconds"])
        write_atomically(folder / "README.md", lambda path: path.write_text(text))
        return quality


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


def _readme(recipe: GeneratorRecipe, about: str, generator: str, quality: dict[str, Any], seconds: float) -> str:
    run = getattr(getattr(recipe, "conditioner", None), "run", None)
    others = "no other data, no pretrained weights" if run is None else f"the encoder is that of the run `{run.name}`"
    text = f"""# {recipe.name}

{about}
Trained by genssl {__version__} in {seconds:.0f} s.

- **Remade by** `genssl train-generator RECIPE --out DIR`; the recipe stands in `card.json`.
- **Data**: the train split of `{recipe.dataset.name}`; no labels, {others}.
- **Licence**: {recipe.licence}.
- **Use**: `generator: {{name: {generator}, model: DIR}}`.
"""
    if not quality:
        return text + "\nNot measured.\n"
    teacher = quality.get("teacher")
    beside = "" if teacher is None else f"\nIts teacher at {_fixed(teacher).lstrip(', ')}:\n\n{_markdown(teacher)}\n"
    return f"""{text}
Measured on {quality["sources"]} held-out sources ({quality["measured_on"]}), {quality["variants_per_source"]} variants
each{_fixed(quality)}, {quality["threads"]} CPU threads, batches of {quality["batch"]}; features are
{quality["features"]}.
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
