"""The study: what `genssl compare` needs to know; arms, each an override of one base recipe, times seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from genssl.config.base import Section
from genssl.config.recipe import Recipe
from genssl.errors import suggest

Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Settings = Annotated[dict[str, Any], Field(description="key.path: value, as `genssl run` takes them")]

STORE_OF_STUDY = "STORE-OF-THE-STUDY"  # stands for a folder below --out until that is known


class Arm(Section):
    """One recipe of a study: the base recipe with other settings."""

    name: Name
    label: str = Field("", description="for people; by default the name")
    note: str = Field("", description="one sentence about what the arm is for")
    set: Settings = Field(default_factory=dict)
    against: list[Name] | None = Field(None, description="arms that this one is compared with; by default the study's")
    wall_clock_of: Name | None = Field(
        None,
        description="trains for as many epochs as fit into the wall-clock of that arm at the same seed, making stored "
        "variants included; train.epochs then follows from measurement",
    )
    control_of: Name | None = Field(
        None,
        description="an A/A control: reads the variants of that arm's store by another way, and must not differ",
    )
    paper: str | None = Field(None, description="a cell of genssl/studies/paper_tables.yaml: TABLE.ROW.COLUMN")


class QuickForm(Section):
    """The short form of a study, for `--quick`: shows that everything works; its numbers mean little."""

    seeds: Seeds
    set: Settings = Field(default_factory=dict)


class Study(Section):
    """Arms times seeds of one base recipe."""

    name: Name
    title: str = ""
    recipe: Path = Field(description="the base recipe, relative to the study's file")
    set: Settings = Field(default_factory=dict, description="settings of every arm, such as train.epochs: 20")
    seeds: Seeds
    metric: str = Field("linear_probe/top1", description="the primary metric, as results.json names it")
    reference: Name = Field(description="the arm without variants")
    against: list[Name] = Field(default_factory=list, description="by default the reference alone")
    headline: list[Name] = Field(
        default_factory=list, max_length=2, description="two arms whose difference the verdict begins with"
    )
    arms: list[Arm] = Field(min_length=2)
    quick: QuickForm | None = None

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed stands more than once")
        return value

    @field_validator("headline")
    @classmethod
    def _two_or_none(cls, value: list[str]) -> list[str]:
        if len(value) == 1:
            raise ValueError("two arms are expected, or none")
        return value

    @field_validator("arms")
    @classmethod
    def _names_agree(cls, arms: list[Arm], info: ValidationInfo) -> list[Arm]:
        names = [arm.name for arm in arms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"more than one arm is called {', '.join(twice)}")
        by_name = {arm.name: arm for arm in arms}
        spoken_of = [("reference", [info.data.get("reference", names[0])])]
        spoken_of += [(key, info.data.get(key, [])) for key in ("against", "headline")]
        for arm in arms:
            spoken_of.append((f"against of {arm.name}", arm.against or []))
            spoken_of.append((f"wall_clock_of of {arm.name}", [arm.wall_clock_of] if arm.wall_clock_of else []))
            spoken_of.append((f"control_of of {arm.name}", [arm.control_of] if arm.control_of else []))
        for what, mentioned in spoken_of:
            for name in mentioned:
                if name not in by_name:
                    raise ValueError(f"{what}: there is no arm {name!r}{suggest(name, names)}")
        for arm in arms:
            if arm.wall_clock_of and by_name[arm.wall_clock_of].wall_clock_of:
                raise ValueError(
                    f"wall_clock_of of {arm.name}: {arm.wall_clock_of} takes its length from another arm itself; "
                    "name an arm with a fixed length"
                )
        return arms


@dataclass(frozen=True)
class LoadedArm:
    """An arm and its recipe, whose seed is not the runs' and whose store may be `STORE_OF_STUDY`."""

    arm: Arm
    recipe: Recipe

    @property
    def stored_variants(self) -> int:
        """How many variants of each image the arm needs in the study's store; 0 if none."""
        variants = self.recipe.variants
        if not self.recipe.uses_variants() or str(variants.store) != STORE_OF_STUDY or variants.per_image == "fresh":
            return 0
        return variants.per_image


@dataclass(frozen=True)
class LoadedStudy:
    """A study whose every recipe is valid."""

    study: Study
    base: Recipe
    arms: list[LoadedArm]
    seeds: list[int]
    quick: bool

    def arm(self, name: str) -> LoadedArm:
        """Returns the arm of a name, which must exist."""
        return next(loaded for loaded in self.arms if loaded.arm.name == name)

    def against(self, arm: Arm) -> list[str]:
        """Returns the arms that an arm is compared with."""
        named = arm.against if arm.against is not None else self.study.against or [self.study.reference]
        return [name for name in named if name != arm.name]

    def as_fast_as(self, arm: Arm) -> LoadedArm | None:
        """Returns the arm of fixed length that is like `arm` but for its length, and so tells how fast it is."""
        meant = _without_length(self.arm(arm.name).recipe)
        same = (item for item in self.arms if not item.arm.wall_clock_of and not item.arm.control_of)
        return next((item for item in same if _without_length(item.recipe) == meant), None)

    def warnings(self) -> list[str]:
        """Returns what is allowed but rarely meant, by arm."""
        found: dict[str, list[str]] = {}
        for loaded in self.arms:
            for warning in loaded.recipe.warnings():
                found.setdefault(warning, []).append(loaded.arm.name)
        return [f"{', '.join(arms)}: {warning}" for warning, arms in found.items()]


def _without_length(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
