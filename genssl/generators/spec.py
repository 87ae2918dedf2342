"""What a generator says of itself; also on the wire. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from genssl.generators.models import shown
from genssl.generators.parameters import Parameters


@dataclass(frozen=True)
class GeneratorSpec:
    """What a generator says of itself.

    Attributes:
        name: registry name, such as "stable_unclip".
        model: the model as the config names it.
        fingerprint: 16 bytes; a digest of weights, configs, dtype and sampler version, part of every variant's key.
        embedding_dim: width of the conditioner's embedding.
        image_size: side of a variant in pixels.
        licence: of the weights, as an SPDX id or a short name.
        defaults: the parameters used where a request names none; their keys are all the parameters that there are.
        settings: what else was fixed when it was loaded, such as dtype and revision, as text by config field.
        former: returns the fingerprint by an older rule, which stored variants may go by; None if there was no other.
        tflops: TFLOP of a variant at the default parameters, conditioner left out (1e12 FLOP, a multiply-add being
            two); None if it is not known.
    """

    name: str
    model: str
    fingerprint: bytes
    embedding_dim: int
    image_size: int
    licence: str
    defaults: Parameters
    settings: dict[str, str]
    tflops: float | None = None
    former: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def title(self) -> str:
        """The generator in messages, which others may see: of a path on this machine, its last part."""
        return f"generator {self.name} ({shown(self.model)})"

    def derived(self, name: Callable[[bytes], bytes], **changes: Any) -> GeneratorSpec:
        """Returns a spec whose fingerprint, and former one, `name` makes of this one's."""
        former = self.former
        return replace(
            self,
            fingerprint=name(self.fingerprint),
            former=None if former is None else lambda: name(former()),
            **changes,
        )

    def to_proto(self) -> dict[str, Any]:
        """Returns the fields of a `generation.v1.GeneratorInfo`, but for the server's id; of paths, the last part.

        Fields and no message, since batching, which has specs at hand, is kept free of the wire.
        """
        return {
            "name": self.name,
            "model": shown(self.model),
            "fingerprint": self.fingerprint,
            "embedding_dim": self.embedding_dim,
            "image_size": self.image_size,
            "licence": self.licence,
            "default_parameters": {name: float(value) for name, value in self.defaults.items()},
            "settings": {name: shown(value) for name, value in self.settings.items()},
            "tflops": self.tflops or 0.0,
        }
