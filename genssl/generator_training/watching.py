"""Looks at a generator while it is trained: a grid of variants and a Frechet distance, and whether to stop early."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from genssl.base.devices import stream
from genssl.base.files import write_json
from genssl.base.ranks import ALONE, Ranks
from genssl.config.generator_recipes.base import WatchConfig
from genssl.data.base import ImageDataset
from genssl.data.decode import resize_and_crop
from genssl.errors import ConfigError
from genssl.evaluators.variants.frechet import frechet_distance
from genssl.generators.configs import GeneratorConfig
from genssl.generators.open import open_generator
from genssl.quality.grid import write_grid
from genssl.quality.measures import BATCH, Sources
from genssl.variants.engine import VariantEngine

GRID_ROWS, GRID_VARIANTS = 8, 6
LOG, GRIDS = "progress.json", "progress"

Publish = Callable[[Path, nn.Module], GeneratorConfig]
"""Writes an averaged network as a whole generator into an existing folder, and returns the config that loads it."""


class Watch:
    """Measures what a training has made so far, on the same sources each time.

    The distance is that of variant 0 of one half of the sources to the real images of the other half, in the features
    of the generator's own conditioner: good for following one training, not for comparing generators with different
    conditioners, which `genssl evaluate-generator` does.

    Args:
        config: how often, on how many sources, and when to stop.
        dataset: the sources; of the train split, held out from the training or not.
        device: where the generator is opened.
        seed: of the choice of sources.
        folder: of the training; `progress.json` and the grids in `progress` go into it.
        ranks: the first one measures, the others wait.
        say: prints a line.
    """

    def __init__(
        self,
        config: WatchConfig,
        dataset: ImageDataset,
        device: torch.device,
        seed: int,
        folder: Path,
        ranks: Ranks = ALONE,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._config, self._dataset, self._device, self._folder = config, dataset, device, folder
        self._ranks, self._say = ranks, say
        chosen = torch.randperm(len(dataset), generator=stream("watch", seed))[: config.sources].tolist()
        self._rows: list[int] = chosen[: len(chosen) // 2 * 2]
        if len(self._rows) < 4:
            raise ConfigError(
                [f"monitor: {len(chosen)} images are too few to compare; give four or more, or leave it out"]
            )
        self.records: list[dict[str, Any]] = []
        self._best: dict[str, torch.Tensor] | None = None
        self._stage = ""

    def begin(self, stage: str) -> None:
        """Begins with a stage, whose looks are compared with each other alone."""
        self._stage, self._best = stage, None

    def due(self, step: int, steps: int) -> bool:
        """Says whether to look after this many steps of so many; after the last one always."""
        return step % self._config.every_steps == 0 or step == steps

    def look(self, step: int, loss: float, average: nn.Module, publish: Publish) -> bool:
        """Measures, draws and records; returns whether to stop, since `patience` looks brought nothing better."""
        record: dict[str, Any] = {}
        if self._ranks.first:
            record = {"stage": self._stage, "step": step, "loss": loss, **self._measure(step, average, publish)}
        record = self._ranks.gather(record)[0]
        self.records.append(record)
        looks = self._looks()
        best = min(range(len(looks)), key=lambda number: float(looks[number]["frechet"]))
        if self._config.patience is not None and best == len(looks) - 1:
            self._best = {name: value.detach().clone() for name, value in average.state_dict().items()}
        if self._ranks.first:
            write_json(self._folder / LOG, self.records)
            self._say(
                f"step {step}: Frechet distance {record['frechet']:.4g} (real images {record['frechet_of_real']:.4g}), "
                f"grid in {GRIDS}/"
            )
        if self._config.patience is None or len(looks) - 1 - best < self._config.patience:
            return False
        self._say(f"step {step}: no better for {self._config.patience} looks; back to step {looks[best]['step']}")
        return True

    def restore_best(self, average: nn.Module) -> None:
        """Puts the best weights seen back into an averaged network, where `patience` chooses by them."""
        if self._best is not None:
            average.load_state_dict(self._best)

    def facts(self) -> dict[str, Any]:
        """Returns what the card says: which step's weights were kept, and what was seen."""
        if not (looks := self._looks()):
            return {}
        kept = looks[-1] if self._config.patience is None else min(looks, key=lambda look: float(look["frechet"]))
        return {"kept_step": kept["step"], "looks": self.records}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint needs."""
        return {"records": self.records, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.records, self._best = state["records"], state["best"]

    def _looks(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["stage"] == self._stage]

    def _measure(self, step: int, average: nn.Module, publish: Publish) -> dict[str, float]:
        scratch = self._folder / ".look"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            engine = VariantEngine(open_generator(publish(scratch, average), self._device), [BATCH])
            half = len(self._rows) // 2
            sources = Sources(engine, self._dataset, self._rows)
            made, _ = sources.variants({}, 1, first=half)
            seen = engine.embed([engine.generator.preprocess(image) for image in made])[0]
            grid, _ = sources.variants({}, GRID_VARIANTS, first=GRID_ROWS)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._draw(step, self._rows[:GRID_ROWS], grid)
        real = torch.stack(sources.embeddings)
        return {
            "frechet": frechet_distance(torch.stack(seen), real[half:]),
            "frechet_of_real": frechet_distance(real[:half], real[half:]),
        }

    def _draw(self, step: int, shown: list[int], images: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        (self._folder / GRIDS).mkdir(exist_ok=True)
        side = self._dataset.image_size
        sized = [resize_and_crop(image, side) for image in images]
        columns = [("source", [self._dataset.image(row) for row in shown])]
        columns += [
            (f"variant {number + 1}", sized[number * len(shown) : (number + 1) * len(shown)])
            for number in range(GRID_VARIANTS)
        ]
        name = f"{self._stage.replace(' ', '-')}-{step:07}.png"
        write_grid(self._folder / GRIDS / name, columns, title=f"sources and variants: {self._stage}, step {step}")
