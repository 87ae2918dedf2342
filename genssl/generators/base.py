"""The contract of a generator: conditioner (image to embedding) and decoder (embedding, seed, parameters to image)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from genssl.data.base import UInt8Array
from genssl.generators.models import shown
from genssl.generators.parameters import Parameters

Alive = Callable[[], Sequence[bool]]


class Cancelled(Exception):
    """No row of a batch was wanted any more, so it was not computed to its end."""


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


class Generator(Protocol):
    """A conditioned generator on one device. Not safe to call from two threads at once.

    One whose rows see in their last bits how the parameters of the others differ from theirs also has
    `generate_exact`, with the arguments of `generate`, of which that does not hold; deterministic batching calls it.
    """

    spec: GeneratorSpec

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings a source uint8 [3, H, W] of any size to the conditioner's input uint8 [3, S, S]."""
        ...

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds preprocessed images uint8 [B, 3, S, S]; returns float32 [B, embedding_dim] on the CPU."""
        ...

    def check(self, parameters: Parameters) -> None:
        """Raises RequestRefusedError if a complete parameter mapping has a value that this generator cannot do."""
        ...

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """Rows whose keys are equal can share one `generate` call."""
        ...

    def generate(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        """Makes one image a row; a row depends on its embedding, seed and parameters, not on its neighbours.

        Args:
            embeddings: float32 [B, embedding_dim].
            seeds: B numbers below 2**64; all noise of a row comes from a CPU generator with this seed, of which torch
                takes the low 32 bits.
            parameters: B complete parameter mappings with equal `batch_key`.
            alive: says of each row whether anyone still wants it; asked between the steps of a sampler, in this thread.
                The images of dead rows are arbitrary. A generator of one forward pass may leave it unasked.
            sizes: batch sizes below B to which the batch may shrink once no more rows than that live.

        Returns:
            uint8 [B, 3, image_size, image_size] on the CPU. Equal to 1 grey level across batch sizes; bit-equal at an
            equal batch size on the same machine, unless the batch shrank.

        Raises:
            Cancelled: if no row lives any more.
        """
        ...


def keep_living(alive: Sequence[bool], rows: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """Says which positions of a batch a sampler goes on with.

    Args:
        alive: of every row that the batch began with, whether anyone still wants it.
        rows: which of them lies at each position now.
        sizes: sizes to which the batch may shrink.

    Returns:
        Positions of the living rows, the last repeated up to one of `sizes`; None if the batch stays as it is.

    Raises:
        Cancelled: if no row lives any more.
    """
    living = list({row: position for position, row in enumerate(rows) if alive[row]}.values())
    if not living:
        raise Cancelled
    fitting = [size for size in sizes if len(living) <= size < len(rows)]
    if not fitting:
        return None
    return living + living[-1:] * (min(fitting) - len(living))
