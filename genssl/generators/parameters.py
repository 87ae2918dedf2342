"""The parameters of a variant, by name: what a mapping may hold beside a generator's own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from genssl.generators.configs import ADAPTIVE, ADAPTS

Parameters = dict[str, float | int]

MAX = ".max"
ADAPTIVE_NAME = f"{ADAPTS}.{ADAPTIVE}"
MIN_SIMILARITY, MAX_TRIES = "min_similarity", "max_tries"
DEFAULT_TRIES = 4


def base_name(name: str) -> str:
    """Returns the parameter that an entry of a mapping is about."""
    return ADAPTS if name == ADAPTIVE_NAME else name.removesuffix(MAX)


def is_known(name: str, defaults: Mapping[str, float]) -> bool:
    """Says whether a generator with these defaults can be asked for `name`."""
    return base_name(name) in defaults or name in (MIN_SIMILARITY, MAX_TRIES)


def merge(defaults: Mapping[str, float], given: Mapping[str, float]) -> Parameters:
    """Returns `given` on top of `defaults`; a parameter given as one number does not vary any more."""
    kept = {name: value for name, value in defaults.items() if name == base_name(name) or base_name(name) not in given}
    merged = kept | dict(given)
    if MIN_SIMILARITY in merged:
        merged.setdefault(MAX_TRIES, DEFAULT_TRIES)
    return merged
