"""What evaluators have in common: frozen features, computed once, and the form of their results."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from genssl.base.cores import usable_cores
from genssl.base.wording import counted
from genssl.config.base import ComponentConfig
from genssl.data.base import ImageDataset, UInt8Array, pixels_of
from genssl.errors import DataError, NoLabelsError, UserError

BATCH = 512
BATCH_PIXELS = BATCH * 96 * 96  # of larger images a batch has fewer, so that activations do not grow with the image
PART = 65536  # rows of a split whose features are in memory at a time, where not all are
KEPT_BYTES = 4 * 2**30  # of the features of a split; more are not kept for the next evaluator, unless it needs all

Variants = Callable[[ImageDataset, Sequence[int], int], UInt8Array]
"""Takes (split, rows, variant index); returns that variant of every row, uint8 [n, 3, S, S] with the split's S."""


@dataclass
class Features:
    """Representations float32 [N, D] of the labelled images of a split, and their labels int64 [N], on the CPU."""

    features: torch.Tensor
    labels: torch.Tensor


class EvaluationData:
    """The train and test split that evaluators judge on.

    Args:
        train: where neighbours and probes come from.
        test: what is classified.
        test_name: what the test split is, such as "test" or "validation (a fifth of train)"; part of every protocol.
        variants: makes variants of images of either split; None in a run without a generator.
    """

    def __init__(
        self, train: ImageDataset, test: ImageDataset, test_name: str, variants: Variants | None = None
    ) -> None:
        self.train, self.test, self.test_name, self.variants = train, test, test_name, variants
        self.num_classes = len(train.class_names or ())

    def require_labels(self, setting: str) -> None:
        """Raises NoLabelsError, naming `setting`, unless both splits have labelled images."""
        for split in (self.train, self.test):
            if split.class_names is None or not any(split.label(row) >= 0 for row in range(len(split))):
                raise NoLabelsError(
                    f"{setting}: the evaluators need labels and {split.name} has none here; set `evaluate: []`, "
                    "keep only evaluators that need none, such as rankme and alignment_uniformity, or give labels"
                )

    def require_per_class(self, count: int, setting: str) -> None:
        """Raises DataError, naming `setting`, unless train has this many images of every class, and two classes."""
        self.require_labels(setting)
        names = self.train.class_names
        assert names is not None
        labels = np.array([self.train.label(row) for row in range(len(self.train))])
        counts = np.bincount(labels[labels >= 0], minlength=self.num_classes)
        if self.num_classes < 2:
            raise DataError(f"{setting}: {self.train.name} has one class ({names[0]}); two are needed to tell apart")
        if counts.min() < count:
            raise DataError(
                f"{setting}: {counted(count, 'image a class is', 'images a class are')} needed, but class "
                f"{names[int(counts.argmin())]!r} has {counts.min()} for training"
            )

    def require_variants(self, setting: str) -> Variants:
        """Returns `variants`; raises DataError, naming `setting`, if there are none."""
        if self.variants is None:
            raise DataError(
                f"{setting}: this needs variants of the images and there is no generator here; give the recipe a "
                "`generator`, or a run that has one, or leave this evaluator out"
            )
        return self.variants


class Sharing(Protocol):
    """The processes that an evaluator may share its work among; `genssl.base.ranks.Ranks` are some."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Returns what every process gives, in their order; all of them call it."""
        ...


class _Alone:
    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class FrozenEncoder:
    """An encoder whose weights and statistics evaluators cannot change; features of a split are computed once.

    Args:
        module: anything with `encode(float [B, 3, S, S] in [0, 1]) -> [B, D]`; it is put into evaluation mode, without
            gradients.
        device: where it runs.
        sharing: the processes that run the same evaluator on copies of the encoder; this one alone by default.
    """

    def __init__(self, module: nn.Module, device: torch.device, sharing: Sharing | None = None) -> None:
        self._module, self.device = module.eval().requires_grad_(False), device
        self.sharing: Sharing = sharing or _Alone()
        # The data set is kept beside its features, since the id of one that is gone may be another's.
        self._cache: dict[int, tuple[ImageDataset, Features]] = {}

    def features(self, dataset: ImageDataset) -> Features:
        """Encodes every labelled image of a split, without augmentation.

        Raises:
            DataError: if no image has a label.
            UserError: if a feature is not finite.
        """
        if id(dataset) not in self._cache:
            rows, labels = _labelled(dataset)
            self._cache[id(dataset)] = dataset, Features(self.encode_rows(dataset, rows), labels)
        return self._cache[id(dataset)][1]

    def shard(self, dataset: ImageDataset) -> Iterator[Features]:
        """Yields the features of this process's share of the labelled images, without augmentation.

        All at once where they are at hand, or few enough to be kept; else in parts of 65,536 images, so that memory
        does not grow with the split. A process yields nothing if there are fewer images than processes.

        Raises:
            DataError: if no image has a label.
            UserError: if a feature is not finite.
        """
        rows, labels = _labelled(dataset)
        if self.sharing.size == 1:
            width = 0 if id(dataset) in self._cache else self.encode_rows(dataset, rows[:1]).shape[1]
            if 4 * width * len(rows) <= KEPT_BYTES:
                yield self.features(dataset)
                return
        rows, labels = rows[self.sharing.rank :: self.sharing.size], labels[self.sharing.rank :: self.sharing.size]
        for start in range(0, len(rows), PART):
            part = slice(start, start + PART)
            yield Features(self.encode_rows(dataset, rows[part]), labels[part])

    def encode_rows(self, dataset: ImageDataset, rows: Sequence[int]) -> torch.Tensor:
        """Returns the representations float32 [len(rows), D] of images of a split, labelled or not, on the CPU.

        Two batches of images are in memory at a time: files are decoded ahead, by a thread a core.
        """
        return self._encode(len(rows), dataset.image_size, partial(_read, dataset, rows))

    def encode(self, images: UInt8Array | torch.Tensor) -> torch.Tensor:
        """Returns the representations float32 [N, D] of images [N, 3, S, S], on the CPU.

        Args:
            images: uint8, or float in [0, 1]; at least one.
        """
        tensor = torch.as_tensor(images)
        return self._encode(len(tensor), tensor.shape[-1], lambda size: iter(torch.split(tensor, size)))

    def copy_of_module(self) -> Any:
        """Returns a copy of the encoder, on its device, in evaluation mode, all of whose parameters can be trained."""
        return copy.deepcopy(self._module).requires_grad_(True).eval()

    def _encode(self, count: int, size: int, batches: Callable[[int], Iterator[torch.Tensor]]) -> torch.Tensor:
        """Encodes `count` images of side `size`, which `batches(n)` yields n at a time."""
        features = torch.empty(0)
        start = 0
        for images in batches(max(1, min(BATCH, BATCH_PIXELS // size**2))):
            with torch.inference_mode():
                encoded = self._module.encode(as_float(images.to(self.device))).float().cpu()  # type: ignore[operator]
            if start == 0:  # one allocation for all, since joining parts would need twice the memory
                features = torch.empty((count, encoded.shape[1]))
            features[start : start + len(encoded)] = encoded
            start += len(encoded)
        if not features.isfinite().all():
            raise UserError(
                "evaluate: the encoder's features are not finite, so the training has diverged; lower optimizer.lr"
            )
        return features


def _labelled(dataset: ImageDataset) -> tuple[list[int], torch.Tensor]:
    """Returns the rows of the labelled images, and their labels; raises DataError if there are none."""
    every = torch.tensor([dataset.label(row) for row in range(len(dataset))])
    rows = (every >= 0).nonzero()[:, 0]
    if len(rows) == 0:
        raise DataError(f"evaluate: {dataset.name} has no labelled image; give labels")
    return rows.tolist(), every[rows]


def _read(dataset: ImageDataset, rows: Sequence[int], size: int) -> Iterator[torch.Tensor]:
    """Yields images of a split uint8 [n, 3, S, S], n = `size` but for the last, the next batch being read meanwhile."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    if pixels_of(dataset) is None:  # arrays, which need no decoding
        for batch in batches:
            yield torch.from_numpy(np.stack([dataset.image(row) for row in batch]))
        return
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="genssl-evaluate") as pool:
        coming: deque[list[Future[UInt8Array]]] = deque()
        try:
            for batch in batches:
                coming.append([pool.submit(dataset.image, row) for row in batch])
                if len(coming) > 1:
                    yield torch.from_numpy(np.stack([image.result() for image in coming.popleft()]))
            while coming:
                yield torch.from_numpy(np.stack([image.result() for image in coming.popleft()]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def as_float(images: torch.Tensor) -> torch.Tensor:
    """Returns images as an encoder takes them, float in [0, 1]; uint8 is divided by 255, float is left as it is."""
    return images if images.is_floating_point() else images.float() / 255


class Evaluator(Protocol):
    """Judges a frozen encoder. Made from its Config.

    One that shares its work among the ranks of a run, by `encoder.sharing`, says so by the class attribute
    `is_shared = True`. All ranks run it then; others are run by the first rank alone.
    """

    protocol: dict[str, Any]
    """Every fact that the numbers depend on; written into results.json."""

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if it cannot judge on this data; called before the training.

        One that needs labels calls `data.require_labels` here, and one that needs variants `data.require_variants`.
        """
        ...

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterable[tuple[str, float]]:
        """Yields (name, value), accuracies in 0..1."""
        ...


ConfigT = TypeVar("ConfigT", bound=ComponentConfig)


class EvaluatorBase(Generic[ConfigT]):
    """What the evaluators here share: their settings, and an empty protocol that `run` fills."""

    def __init__(self, config: ConfigT) -> None:
        self._config = config
        self.protocol: dict[str, Any] = {}
