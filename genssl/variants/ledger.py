"""The counts a run keeps of where its views came from and what they cost."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from genssl.variants.usage import PlannedUsage, VariantUsage

Origin = Literal["generated", "store", "reused", "real"]
LATENCIES = 512  # of the latest fetches, which percentiles are taken of


@dataclass
class Ledger:
    """Counts and seconds of one run.

    Attributes:
        origins: views delivered in place of variants, by origin.
        usage: which variants were used, and how often each stood in for one that was late. That of a plan wants the
            row of every delivery.
        stall_seconds: time the training waited for variants.
        generator_seconds: device time that the generator spent on this run's variants, as the server reports it.
        trainer_seconds: wall time of the training loop without stalls.
        variants_computed: variants that the generator made for this run, whether a view got them or not.
        bytes_received: payload bytes of variants over the wire.
        calls: requests sent to a server or generate calls in process.
        retries: requests repeated because the server was unreachable or overloaded.
        retries_by_kind: the same by what the server was: "away" (or late), or "full".
        variants_dropped: announced variants whose step passed before they were asked for.
        variants_redrawn: draws that the drift guard added in this process; a server counts its own.
        variants_refreshed: variants that were generated ahead of the plan, into the pool.
        prefetch_depth: steps ahead that variants are asked for now.
        fetch_seconds: of the latest requests, from sending to arrival.
    """

    origins: Counter[Origin] = field(default_factory=Counter)
    usage: VariantUsage | PlannedUsage = field(default_factory=VariantUsage, compare=False)
    stall_seconds: float = 0.0
    generator_seconds: float = 0.0
    trainer_seconds: float = 0.0
    variants_computed: int = 0
    bytes_received: int = 0
    calls: int = 0
    retries: int = 0
    retries_by_kind: Counter[str] = field(default_factory=Counter)
    variants_dropped: int = 0
    variants_redrawn: int = 0
    variants_refreshed: int = 0
    prefetch_depth: int = 0
    fetch_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES))

    def deliver(self, source_id: bytes, index: int, origin: Origin, row: int | None = None) -> None:
        """Counts one view that the plan wanted to be a variant: which one it got, of which image, and from where."""
        self.origins[origin] += 1
        if origin == "real":
            return
        if isinstance(self.usage, PlannedUsage):
            assert row is not None, "a plan's variants are those of rows"
            self.usage.add(source_id, index, origin == "reused", row)
        else:
            self.usage.add(source_id, index, origin == "reused")

    @property
    def wanted(self) -> int:
        """How many views the plan wanted to be variants."""
        return sum(self.origins.values())

    @property
    def fresh_fraction(self) -> float:
        """Part of the deliveries that were the planned variant, neither reused nor replaced; 0 if none was wanted."""
        total = self.wanted
        return (self.origins["generated"] + self.origins["store"]) / total if total else 0.0

    def fetch_percentile(self, percent: float) -> float:
        """Returns the seconds within which so many percent of the latest requests were answered; 0 before the first."""
        latest = list(self.fetch_seconds)  # the queue's thread appends meanwhile
        return float(np.percentile(latest, percent)) if latest else 0.0

    def state(self) -> dict[str, Any]:
        """Returns everything, as plain values and arrays, for `restore`."""
        counts = {name: getattr(self, name) for name in _PLAIN}
        return counts | {
            "origins": dict(self.origins),
            "retries_by_kind": dict(self.retries_by_kind),
            "fetch_seconds": list(self.fetch_seconds),
            "usage": self.usage.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state` returned."""
        for name in _PLAIN:
            setattr(self, name, state.get(name, 0))
        self.origins, self.retries_by_kind = Counter(state["origins"]), Counter(state["retries_by_kind"])
        self.fetch_seconds.clear()
        self.fetch_seconds.extend(state["fetch_seconds"])
        usage = state["usage"]
        if isinstance(usage, dict):
            assert isinstance(self.usage, PlannedUsage), "the state is that of a plan's usage"
            self.usage.restore(usage)
        else:
            self.usage = VariantUsage()
            self.usage.restore(*usage)

    def summary(self) -> dict[str, float | int]:
        """Returns the ledger as results.json holds it."""
        stand_ins = self.usage.stand_ins
        return {
            "views_generated": self.origins["generated"],
            "variants_generated": self.origins["generated"],  # its old name, for a release
            "variants_computed": self.variants_computed,
            "variants_from_store": self.origins["store"],
            "variants_reused": self.origins["reused"],
            "fallbacks_to_real": self.origins["real"],
            "distinct_variants": self.usage.distinct,
            "fresh_fraction": round(self.fresh_fraction, 6),
            "reuse_mean": round(self.origins["reused"] / stand_ins, 3) if stand_ins else 0.0,
            "reuse_max": self.usage.most_stand_ins,
            "variants_dropped": self.variants_dropped,
            "variants_redrawn": self.variants_redrawn,
            "variants_refreshed": self.variants_refreshed,
            "stall_seconds": round(self.stall_seconds, 3),
            "generator_seconds": round(self.generator_seconds, 3),
            "trainer_seconds": round(self.trainer_seconds, 3),
            "bytes_received": self.bytes_received,
            "calls": self.calls,
            "retries": self.retries,
            **{f"retries_{kind}": count for kind, count in sorted(self.retries_by_kind.items())},
            "prefetch_depth": self.prefetch_depth,
            "fetch_seconds_p50": round(self.fetch_percentile(50), 4),
            "fetch_seconds_p95": round(self.fetch_percentile(95), 4),
        }


# The counts and seconds that are plain numbers; a prefetch depth is worked out anew by every process.
_PLAIN = [one.name for one in fields(Ledger) if one.type in ("int", "float") and one.name != "prefetch_depth"]
