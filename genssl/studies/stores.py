"""The stores of a study: filled once, read by every arm that draws from the same generator and data set."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssl.base.files import write_json
from genssl.base.wording import counted
from genssl.config.recipe import Recipe
from genssl.config.study import LoadedArm
from genssl.offline.pregenerate import Pregenerated, pregenerate
from genssl.studies.model import StoreCost
from genssl.training.supply.stores import generator_block

COSTS = "stores.json"
FILLED_TO = "filled_to"


@dataclass(frozen=True)
class StoreShare:
    """What reading K variants of each image costs an arm, as if no other arm read them."""

    variants: int
    seconds: float
    generator_seconds: float
    bytes: int


class StudyStores:
    """Fills stores below the study's folder, and remembers what that took.

    A store gets as many variants of each image as the arm that wants most; `note` is given lines for the user.
    """

    def __init__(self, out: Path, arms: Iterable[LoadedArm], note: Callable[[str], None]) -> None:
        self._out, self._note = out.resolve(), note  # the same wherever the command is typed
        self._wanted: dict[str, int] = {}
        for arm in arms:
            if arm.stored_variants:
                name = _name(arm.recipe)
                self._wanted[name] = max(self._wanted.get(name, 0), arm.stored_variants)
        self._costs: dict[str, dict[str, Any]] = (
            json.loads((out / COSTS).read_text()) if (out / COSTS).is_file() else {}
        )

    def folder(self, recipe: Recipe) -> Path:
        """Returns where the store of an arm lies."""
        return self._out / "stores" / _name(recipe)

    def fill(self, recipe: Recipe) -> None:
        """Makes what the store of an arm lacks, for all arms that read it.

        Nothing trains meanwhile, so the generator has the whole machine.

        Raises:
            UserError: for everything that the user can put right; what was stored stays.
        """
        name, folder = _name(recipe), self.folder(recipe)
        cost = self._costs.setdefault(name, {"made": 0, "seconds": 0.0, "generator_seconds": 0.0, FILLED_TO: 0})
        if cost[FILLED_TO] >= self._wanted[name]:
            return
        self._note(f"making {counted(self._wanted[name], 'variant')} of each image, for every arm that reads them")
        alone = recipe.model_copy(
            update={
                "variants": recipe.variants.model_copy(update={"source": "in_process", "store": None}),
                "train": recipe.train.model_copy(update={"threads": "auto"}),
            }
        )
        report = _FillingReport(self._note)
        try:
            done = pregenerate(alone, folder, variants=self._wanted[name], report=report)
            cost[FILLED_TO], cost["total"] = self._wanted[name], done.total
        finally:  # an interrupted filling has cost something too
            cost["made"] += report.done.made
            cost["seconds"] += report.done.seconds
            cost["generator_seconds"] += report.done.generator_seconds
            write_json(self._out / COSTS, self._costs)

    def share(self, recipe: Recipe, variants: int) -> StoreShare:
        """Returns the part of a store's cost that `variants` of each image have, in proportion."""
        cost = self._costs[_name(recipe)]
        count = cost["total"] * variants // cost[FILLED_TO]
        made = max(1, cost["made"])
        return StoreShare(
            variants=count,
            seconds=cost["seconds"] / made * count,
            generator_seconds=cost["generator_seconds"] / made * count,
            bytes=round(_size(self.folder(recipe)) / cost["total"] * count),
        )

    def costs(self, recipes: Iterable[Recipe]) -> list[StoreCost]:
        """Returns every filled store of these recipes once, and what it took."""
        found: dict[str, StoreCost] = {}
        for recipe in recipes:
            name = _name(recipe)
            if name not in self._costs or FILLED_TO not in self._costs[name] or name in found:
                continue
            cost = self._costs[name]
            assert recipe.generator is not None
            found[name] = StoreCost(
                directory=str(self.folder(recipe).relative_to(self._out)),
                generator=recipe.generator.name,
                variants_per_image=cost[FILLED_TO],
                variants=cost["total"],
                seconds=cost["seconds"],
                generator_seconds=cost["generator_seconds"],
                bytes=_size(self.folder(recipe)),
            )
        return list(found.values())


def _name(recipe: Recipe) -> str:
    """Returns one name for all recipes that can share a store."""
    assert recipe.generator is not None
    meant = [generator_block(recipe), recipe.dataset.model_dump(mode="json"), recipe.train.validation_fraction]
    digest = hashlib.blake2b(json.dumps(meant, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{recipe.generator.name}-{digest}"


def _size(folder: Path) -> int:
    """Returns the bytes that the files of a store take on disk; LMDB's maps are sparse."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class _FillingReport:
    """Keeps what was done, and says now and then how far it is."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.done = Pregenerated(total=0)
        self.note = note
        self._said = time.monotonic()

    def start(self, done: Pregenerated) -> None:
        self.done = done

    def advance(self, done: Pregenerated) -> None:
        self.done = done
        if time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            self.note(f"{done.there + done.made:,} of {done.total:,} variants are stored")
