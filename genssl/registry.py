"""What a recipe can name: methods, backbones, generators, evaluators, data sets.

Built-ins stand in the list `ENTRIES` of their package, such as `genssl.methods`, as strings ("module:attribute"), so
that listing and validating import neither torch nor diffusers.
A plug-in is either registered by a decorator in code that is already imported,

    @METHODS.register("my_method", config=MyConfig)
    class MyMethod(nn.Module): ...

or found through an entry point of the group `genssl.<kind>`, which is loaded only when its name is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from genssl.errors import UserError, suggest

T = TypeVar("T")

ANY = "<model>"  # an entry "library/<model>" stands for all names "library/..."


@dataclass(frozen=True)
class Entry:
    """One registered name. `target` and `config` are "module:attribute" or the object itself."""

    name: str
    target: Any
    config: Any
    summary: str
    origin: str = "genssl"
    licence: str = ""  # of the weights
    cost: str = ""  # of one result


class UnknownNameError(UserError):
    """A name that no registry entry and no entry point has."""


class PluginError(UserError):
    """A plug-in that is installed but cannot be imported, or is not made as one must be."""


class Registry:
    """Names of one kind, each with the thing it stands for and the pydantic `Config` that validates its block.

    Args:
        kind: plural noun used in messages and as the suffix of the entry-point group, such as "methods".
        builtins: the entries that ship with genssl, or the package in whose `ENTRIES` they are, imported when needed.
    """

    def __init__(self, kind: str, builtins: str | Sequence[Entry]) -> None:
        self.kind = kind
        self._builtins = builtins

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        builtins = self._builtins
        if isinstance(builtins, str):
            builtins = importlib.import_module(builtins).ENTRIES
        return {entry.name: entry for entry in builtins}

    def register(
        self, name: str, *, config: Any = None, summary: str = "", licence: str = "", cost: str = ""
    ) -> Callable[[T], T]:
        """Returns a decorator that adds a class or function under `name`.

        Args:
            name: what recipes write.
            config: the block's pydantic model; by default the object's attribute `Config`.
            summary: one line for `genssl list`; by default the first line of the docstring.
            licence, cost: of weights and of one result, for `genssl list -v`.

        Raises:
            ValueError: if the name is taken, or if there is no Config.
        """

        def add(target: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind}: {name!r} is registered already (by {self._entries[name].origin})")
            model = config if config is not None else getattr(target, "Config", None)
            if model is None:
                raise ValueError(f"{self.kind}: {name!r} has no Config; pass config=... or give it an attribute Config")
            text = summary or (target.__doc__ or "").strip().split("\n")[0]
            origin = getattr(target, "__module__", "unknown")
            self._entries[name] = Entry(
                name=name, target=target, config=model, summary=text, origin=origin, licence=licence, cost=cost
            )
            return target

        return add

    def get(self, name: str) -> Any:
        """Returns the registered class or function, importing it now.

        Raises:
            UnknownNameError: with the nearest match and all names.
            PluginError: if it is a plug-in that cannot be imported or has no Config.
        """
        return _load(self._entry(name).target)

    def config(self, name: str) -> Any:
        """Returns the pydantic model that validates a block with this name; imports no heavy library for built-ins.

        Raises:
            UnknownNameError: with the nearest match and all names.
            PluginError: if it is a plug-in that cannot be imported or has no Config.
        """
        return _load(self._entry(name).config)

    def names(self) -> list[str]:
        """Returns every name, entry points included, sorted; loads nothing."""
        return sorted({*self._entries, *self._entry_points()})

    def describe(self) -> list[tuple[str, str, str]]:
        """Returns (name, summary, origin) of every entry, sorted by name; loads nothing."""
        rows = {entry.name: (entry.name, entry.summary, entry.origin) for entry in self._entries.values()}
        for point in self._entry_points().values():
            rows.setdefault(point.name, (point.name, "", point.value.partition(":")[0]))
        return [rows[name] for name in sorted(rows)]

    def details(self) -> dict[str, tuple[str, str]]:
        """Returns licence and cost by name, of the entries that say one of them; loads nothing."""
        entries = self._entries.values()
        return {entry.name: (entry.licence, entry.cost) for entry in entries if entry.licence or entry.cost}

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"genssl.{self.kind}")}

    def _entry(self, name: str) -> Entry:
        if name in self._entries:
            return self._entries[name]
        library, _, model = name.partition("/")
        if model and (entry := self._entries.get(f"{library}/{ANY}")) is not None:
            return entry
        point = self._entry_points().get(name)
        if point is None:
            raise UnknownNameError(f"{name!r} is not one of the {self.kind}{suggest(name, self.names())}")
        try:
            target = point.load()
            if name not in self._entries:  # the plug-in may have used the decorator itself
                self.register(name)(target)
        except ImportError as error:
            raise PluginError(
                f"the plug-in for {name!r} ({point.value}) cannot be imported: {error}; "
                "install what it needs, or uninstall it"
            ) from error
        except Exception as error:  # whatever foreign code raises while it is imported, or has no Config
            raise PluginError(
                f"the plug-in for {name!r} ({point.value}) cannot be used: {type(error).__name__}: {error}; "
                "correct it, or uninstall it"
            ) from error
        return self._entries[name]


def _load(reference: Any) -> Any:
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def builtin(
    package: str, name: str, target: str, summary: str, *, config: str = "", licence: str = "", cost: str = ""
) -> Entry:
    """Returns the entry of something that ships with genssl.

    Args:
        package: in which `target` and `config` lie.
        name: what recipes write.
        target: "module:attribute", below the package.
        summary: one line for `genssl list`.
        config: of its pydantic model, below the package; by default "configs:", the attribute, "Config".
        licence, cost: see `Registry.register`.
    """
    config = config or f"configs:{target.partition(':')[2]}Config"
    return Entry(name, f"{package}.{target}", f"{package}.{config}", summary, licence=licence, cost=cost)


DATASETS = Registry("datasets", "genssl.data")
BACKBONES = Registry("backbones", "genssl.backbones")
GENERATORS = Registry("generators", "genssl.generators")
METHODS = Registry("methods", "genssl.methods")
EVALUATORS = Registry("evaluators", "genssl.evaluators")

REGISTRIES: dict[str, Registry] = {
    registry.kind: registry for registry in (METHODS, BACKBONES, GENERATORS, EVALUATORS, DATASETS)
}

TRAINABLE = Registry(
    "trainable_generators",
    [
        Entry(
            name=name,
            target=f"genssl.generator_training.{place}",
            config=f"genssl.config.generator_recipes.{recipe}",
            summary=summary,
        )
        for name, place, recipe, summary in [
            ("flow", "flow:FlowTraining", "flow:FlowRecipe", "rectified flow, and its student of few steps"),
            ("icgan", "icgan:ICGANTraining", "icgan:ICGANRecipe", "instance-conditioned GAN"),
            (
                "stable_unclip",
                "unclip:StableUnCLIPTraining",
                "unclip:StableUnCLIPRecipe",
                "miniature Stable unCLIP, an ordinary diffusers folder",
            ),
        ]
    ],
)
"""The `family` of a generator's recipe: a `GeneratorTraining` as target, its `GeneratorRecipe` as config."""
