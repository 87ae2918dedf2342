"""The counts a run keeps of where its views came from and what they cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["generated", "store", "reused", "real"]


@dataclass
class Ledger:
    """Counts and seconds of one run.

    Attributes:
        origins: views delivered in place of variants, by origin.
        distinct: hashes of (source_id, index) of the variants used; numbers take a third of the memory of the names.
        stall_seconds: time the training waited for variants.
        generator_seconds: device time that the generator spent on this run's variants, as the server reports it.
        trainer_seconds: wall time of the training loop without stalls.
        bytes_received: payload bytes of variants over the wire.
        calls: requests sent to a server or generate calls in process.
        retries: requests repeated because the server was unreachable.
    """

    origins: Counter[Origin] = field(default_factory=Counter)
    distinct: set[int] = field(default_factory=set)
    stall_seconds: float = 0.0
    generator_seconds: float = 0.0
    trainer_seconds: float = 0.0
    bytes_received: int = 0
    calls: int = 0
    retries: int = 0

    def deliver(self, source_id: bytes, index: int, origin: Origin) -> None:
        """Counts one view that the plan wanted to be a variant."""
        self.origins[origin] += 1
        if origin != "real":
            self.distinct.add(hash((source_id, index)))

    @property
    def fresh_fraction(self) -> float:
        """Part of the deliveries that were the planned variant, neither reused nor replaced; 0 if none was wanted."""
        total = sum(self.origins.values())
        return (self.origins["generated"] + self.origins["store"]) / total if total else 0.0

    def summary(self) -> dict[str, float | int]:
        """Returns the ledger as results.json holds it."""
        return {
            "variants_generated": self.origins["generated"],
            "variants_from_store": self.origins["store"],
            "variants_reused": self.origins["reused"],
            "fallbacks_to_real": self.origins["real"],
            "distinct_variants": len(self.distinct),
            "fresh_fraction": round(self.fresh_fraction, 6),
            "stall_seconds": round(self.stall_seconds, 3),
            "generator_seconds": round(self.generator_seconds, 3),
            "trainer_seconds": round(self.trainer_seconds, 3),
            "bytes_received": self.bytes_received,
            "calls": self.calls,
            "retries": self.retries,
        }
