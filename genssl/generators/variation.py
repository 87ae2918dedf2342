"""Parameters that vary between variants, without a variant being any less a function of its key.

What varies is part of the complete parameter mapping, hence of the key, of a store's name for a variant, and of the
wire, which all know numbers only:

`NAME` and `NAME.max`    the value is drawn between the two, by the variant's seed and the name
`noise_level.adaptive`   1: the value follows from the source's foreground, see `adaptive_noise_level`
`min_similarity`         a variant less similar to its source is drawn anew by the next seed of its own sequence,
`max_tries`              at most so often in all

A mapping without them is what it was before there were any, and so is its digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from genssl.errors import RequestRefusedError, suggest
from genssl.generators.base import EmbedsForeground, Generator
from genssl.generators.configs import ADAPTIVE, ADAPTS, SIZES, GeneratorConfig
from genssl.generators.parameters import (
    ADAPTIVE_NAME,
    MAX,
    MAX_TRIES,
    MIN_SIMILARITY,
    Parameters,
    base_name,
    is_known,
    merge,
)

MOST_TRIES = 64
MOST_NOISE = 400  # GenView's largest level


@dataclass(frozen=True)
class Variation:
    """What of a parameter mapping is settled only when source and seed are known.

    Attributes:
        ranges: (low, high) by parameter.
        whole: those of them that are counts; both ends can be drawn.
        adaptive: whether the noise level follows from the source.
        min_similarity: of variant and source; None: whatever comes is taken.
        max_tries: draws of a variant.
    """

    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    adaptive: bool = False
    min_similarity: float | None = None
    max_tries: int = 1

    def settle(self, parameters: Parameters, seed: int, foreground: float | None) -> Parameters:
        """Returns the parameters of the variant with this seed; an adaptive one needs its source's `foreground`."""
        settled = dict(parameters)
        for name, (low, high) in self.ranges.items():
            part = _uniform(seed, name)
            settled[name] = int(low + part * (high - low + 1)) if name in self.whole else low + part * (high - low)
        if self.adaptive:
            assert foreground is not None, "complete() lets only generators through that know the foreground"
            settled[ADAPTS] = adaptive_noise_level(foreground)
        return settled


def adaptive_noise_level(foreground: float) -> int:
    """Returns 0, 100, 200, 300 or 400: a step for each fifth that the foreground fills (GenView, 2403.12003)."""
    return 100 * min(MOST_NOISE // 100, int(foreground * 5))


def redraw_seed(seed: int, number: int) -> int:
    """Returns the seed of draw `number` >= 1 of a variant whose first had `seed`; below 2**63."""
    text = seed.to_bytes(8, "little") + number.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"genssl/redraw").digest(), "little") >> 1


def varying_parameters(config: GeneratorConfig) -> Parameters:
    """Returns what a generator's block adds to the parameters of its variants."""
    found: Parameters = {}
    for name, value in (config.varying or {}).items():
        if isinstance(value, str):
            found[ADAPTIVE_NAME] = 1
        else:
            found[name + MAX] = value[1]
    if config.interpolation is not None and isinstance(config.interpolation.amount, tuple):
        found["interpolation.max"] = config.interpolation.amount[1]
    if config.drift_guard is not None:
        found |= {MIN_SIMILARITY: config.drift_guard.min_similarity, MAX_TRIES: config.drift_guard.max_tries}
    return found


def complete(generator: Generator, given: Mapping[str, float]) -> tuple[Parameters, Parameters, Variation | None]:
    """Checks parameters and completes them by the generator's defaults.

    Returns:
        The complete mapping, which names variants; of it what the generator is given, with the low end of every
        range; and what varies, None if nothing does.

    Raises:
        RequestRefusedError: for a parameter that this generator does not have, infinities and NaN, a fraction where a
            whole number is due, or a value that the generator cannot do, at either end of a range.
    """
    spec = generator.spec
    for name, value in given.items():
        if not is_known(name, spec.defaults):
            raise RequestRefusedError(f"{spec.name} has no parameter {name!r}{suggest(name, spec.defaults)}")
        if not math.isfinite(value):
            raise RequestRefusedError(f"{spec.name}: parameter {name} is {value}; a finite number is expected")
    whole: dict[str, float | int] = {}
    for name, value in merge(spec.defaults, given).items():
        kind = int if name in (MAX_TRIES, ADAPTIVE_NAME) else type(spec.defaults.get(base_name(name), 0.0))
        if kind(value) != value:
            raise RequestRefusedError(f"{spec.name}: parameter {name} is a whole number, not {value!r}")
        whole[name] = kind(value) + 0  # -0.0 becomes 0.0: equal parameters must have equal names
    plain = {name: value for name, value in whole.items() if _is_plain(name)}
    variation = _variation(generator, whole)
    generator.check(plain)
    if variation is None:
        return whole, plain, None
    highest = plain | {name: type(plain[name])(high) for name, (_, high) in variation.ranges.items()}
    if variation.adaptive:
        highest[ADAPTS] = MOST_NOISE
    if highest != plain:
        generator.check(highest)
    return whole, plain, variation


def _is_plain(name: str) -> bool:
    return name == base_name(name) and name not in (MIN_SIMILARITY, MAX_TRIES)


def _variation(generator: Generator, whole: Parameters) -> Variation | None:
    spec = generator.spec
    ranges = {}
    for name, high in whole.items():
        if not name.endswith(MAX):
            continue
        base = base_name(name)
        if base in SIZES:
            raise RequestRefusedError(f"{spec.name}: parameter {base}: the variants of a run have one size, no range")
        if high < whole[base]:
            raise RequestRefusedError(
                f"{spec.name}: parameter {name} is {high}, below {whole[base]}, where the range of {base} begins"
            )
        ranges[base] = (whole[base], high)
    adaptive = ADAPTIVE_NAME in whole
    if adaptive and (whole[ADAPTIVE_NAME] != 1 or ADAPTS in ranges):
        raise RequestRefusedError(f"{spec.name}: parameter {ADAPTIVE_NAME} is 1, and {ADAPTS} then has no range")
    if adaptive and not isinstance(generator, EmbedsForeground):
        raise RequestRefusedError(
            f"{spec.name}: {ADAPTS}: {ADAPTIVE} needs a conditioner with a feature map, which this generator has not; "
            "give a number or a range"
        )
    similarity, tries = whole.get(MIN_SIMILARITY), int(whole.get(MAX_TRIES, 1))
    if (similarity is not None and not -1 <= similarity <= 1) or not 1 <= tries <= MOST_TRIES:
        raise RequestRefusedError(
            f"{spec.name}: {MIN_SIMILARITY} is {similarity} and {MAX_TRIES} {tries}; allowed are -1..1, 1..{MOST_TRIES}"
        )
    if not ranges and not adaptive and similarity is None:
        return None
    counts = frozenset(name for name in ranges if isinstance(whole[name], int))
    return Variation(ranges, counts, adaptive, similarity, tries)


def _uniform(seed: int, name: str) -> float:
    """Returns a number in [0, 1) that depends on the seed and the parameter's name alone."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + name.encode(), digest_size=8, person=b"genssl/range")
    return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53
