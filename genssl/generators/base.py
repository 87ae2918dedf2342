"""The contract of a generator: conditioner (image to embedding) and decoder (embedding, seed, parameters to image)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genssl.config.base import ComponentConfig
from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.fingerprint import Fingerprint
from genssl.generators.parameters import Parameters
from genssl.generators.spec import GeneratorSpec as GeneratorSpec

if TYPE_CHECKING:
    from genssl.generators.embedding_cache import DiskEmbeddings

Alive = Callable[[], Sequence[bool]]


class Cancelled(Exception):
    """No row of a batch was wanted any more, so it was not computed to its end."""


class Generator(Protocol):
    """A conditioned generator on one device. Not safe to call from two threads at once.

    What it can do besides, it says by having the methods of `EmbedsForeground`, `KeepsEmbeddings`,
    `HasConditionerFingerprint`, `ReleasesConditioner` or `GeneratesExactly`; a plug-in needs none of them.
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


@runtime_checkable
class EmbedsForeground(Protocol):
    """A generator whose conditioner also tells how much of a source is foreground, which `noise_level: adaptive` needs.

    The engine then calls this in place of `embed`, and keeps the part beside the embedding.
    """

    def embed_with_foreground(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S]; returns float32 [B, embedding_dim + 1] on the CPU, the last column in 0..1."""
        ...


@runtime_checkable
class KeepsEmbeddings(Protocol):
    """A generator with embeddings of sources on disk, as `open_generator` gives it to one with `embedding_cache`."""

    kept_embeddings: DiskEmbeddings


@runtime_checkable
class HasConditionerFingerprint(Protocol):
    """A generator that names its conditioner, so that generators with the same one share embeddings on disk.

    One without it has its embeddings kept under its own fingerprint.
    """

    def conditioner_fingerprint(self) -> bytes:
        """Returns 16 bytes that name the conditioner with its preprocessing, and nothing of the decoder."""
        ...


@runtime_checkable
class ReleasesConditioner(Protocol):
    """A generator whose conditioner can leave memory while all embeddings come from disk."""

    def release_conditioner(self) -> None:
        """Frees the conditioner's memory; the next `embed` loads it again."""
        ...


@runtime_checkable
class GeneratesExactly(Protocol):
    """A generator whose rows see in their last bits, in `generate`, how parameters of the others differ from theirs.

    Deterministic batching calls this in its place, in which they do not.
    """

    def generate_exact(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        """Does as `Generator.generate`; at an equal batch size a row's bits depend on no other row."""
        ...


class ImageEncoder(Protocol):
    """A frozen conditioner.

    Attributes:
        embedding_dim: width D of an embedding.
    """

    embedding_dim: int

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings uint8 [3, H, W] of any size to uint8 [3, S, S]."""
        ...

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, D] on the CPU."""
        ...


class DescribedGenerator(ABC):
    """What genssl's own generators share: a conditioner, bounds of the parameters, and a spec that keeps to them.

    A subclass sets `_encoder`, and calls `_describe` when all is loaded.
    """

    spec: GeneratorSpec
    _encoder: ImageEncoder
    _notes: Mapping[str, str] = {}  # what a message adds where a parameter is out of bounds

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """See `Generator`."""
        return self._encoder.preprocess(image)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """See `Generator`."""
        return self._encoder.embed(images)

    def check(self, parameters: Parameters) -> None:
        """See `Generator`."""
        for name, (low, high) in self._bounds().items():
            if not low <= parameters[name] <= high:
                note = self._notes.get(name, "")
                raise RequestRefusedError(
                    f"parameter {name}: {parameters[name]} is outside {low:.15g}..{high:.15g}{note}"
                )

    @abstractmethod
    def _bounds(self) -> dict[str, tuple[float, float]]:
        """Returns the lowest and the highest value of every parameter."""

    def _tflops(self) -> float | None:
        """Returns what a variant costs at the defaults, see `GeneratorSpec.tflops`."""
        return None

    def _describe(
        self,
        config: ComponentConfig,
        fingerprint: Fingerprint | bytes,
        *,
        image_size: int,
        licence: str,
        defaults: Parameters,
        settings: dict[str, str],
        embedding_dim: int | None = None,
        model: str | None = None,
    ) -> None:
        """Sets `spec`; raises GeneratorError if a default cannot be done."""
        self.spec = GeneratorSpec(
            name=config.name,
            model=model or str(getattr(config, "model", "")),
            fingerprint=fingerprint if isinstance(fingerprint, bytes) else fingerprint.digest,
            former=None if isinstance(fingerprint, bytes) else fingerprint.former,
            embedding_dim=embedding_dim or self._encoder.embedding_dim,
            image_size=image_size,
            licence=licence,
            defaults=defaults,
            settings=settings,
        )
        check_defaults(self, getattr(config, "model", config.name))
        self.spec = replace(self.spec, tflops=self._tflops())


def check_defaults(generator: DescribedGenerator | Generator, title: str) -> None:
    """Raises GeneratorError if a generator cannot do its own default parameters."""
    try:
        generator.check(generator.spec.defaults)
    except RequestRefusedError as error:
        raise GeneratorError(f"generator {title}: {error}") from None


def count_tflops(compute: Callable[[], object]) -> float:
    """Returns the TFLOP (1e12; a multiply-add is two) of what a function computes: convolutions, products, attention.

    Shapes alone are followed, so that the count of a full-size model takes neither long nor memory.

    Args:
        compute: makes its tensors itself; networks that it calls, not compiled ones, stay as they are.
    """
    # By its products, since the counter does not know the CPU's fused attention.
    fakes, attention = FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), fakes, attention, FlopCounterMode(display=False) as counter:
        compute()
    return float(counter.get_total_flops()) / 1e12


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
