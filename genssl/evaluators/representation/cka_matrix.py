"""CKA between all layers of two encoders, batch by batch (Nguyen et al. 2020, arXiv 2010.15327, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from genssl.data.base import ImageDataset
from genssl.errors import DataError
from genssl.evaluators.base import as_float
from genssl.evaluators.representation.similarity import CONSTANT

FEATURES = "features"
FEWEST = 4  # images of a batch, for HSIC_1
CONTAINERS = (nn.Sequential, nn.ModuleList)
INERT = (nn.Identity, nn.Dropout)

# Shapes: B images of a batch, P features of a layer, L and M layers of the first and second encoder.


@dataclass(frozen=True)
class CKAMatrix:
    """Debiased CKA of layers.

    Attributes:
        values: float64 [L, M]; NaN where a layer gives all images the same features.
        first, second: names of the layers, in the order of the computation.
        images: how many it was estimated from.
        batch: the largest number of images in a batch.
    """

    values: npt.NDArray[np.float64]
    first: list[str]
    second: list[str]
    images: int
    batch: int


class MinibatchCKA:
    """Accumulates HSIC_1 over batches for all pairs of layers, and divides once at the end.

    The mean of HSIC_1 over batches is unbiased, whatever the batch size; a mean of ratios is not. Memory is that of the
    Gram matrices of one batch.
    """

    def __init__(self) -> None:
        self._cross: Any = 0.0
        self._first: Any = 0.0
        self._second: Any = 0.0
        self.batches = 0

    def update(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
        """Adds a batch.

        Args:
            first, second: features [B, P] of each layer, of the same images, in random order; B is 4 or more.
        """
        grams = [torch.stack([_u_centred(features) for features in side]).flatten(1) for side in (first, second)]
        count = len(first[0])
        # The inner product of U-centred Gram matrices is n (n - 3) HSIC_1 (Szekely and Rizzo 2014, section 3).
        scale = count * (count - 3)
        self._cross = self._cross + grams[0] @ grams[1].T / scale
        self._first = self._first + grams[0].square().sum(1) / scale
        self._second = self._second + grams[1].square().sum(1) / scale
        self.batches += 1

    def value(self) -> torch.Tensor:
        """Returns CKA float64 [L, M]; NaN where a layer's features are constant."""
        values: torch.Tensor = self._cross / (self._first[:, None] * self._second[None, :]).sqrt()
        return values


def cka_matrix(
    first: nn.Module,
    second: nn.Module,
    dataset: ImageDataset,
    second_dataset: ImageDataset | None = None,
    *,
    rows: Sequence[int] | None = None,
    batch: int = 256,
    seed: int = 0,
    device: torch.device | None = None,
) -> CKAMatrix:
    """Returns the debiased CKA of all layers of two encoders.

    Batches are equally large but for one image, and drawn in a random order: in a data set sorted by class a batch
    would have few classes, and CKA would be that within classes.

    Args:
        first, second: encoders in evaluation mode with `encode(float [B, 3, S, S] in [0, 1])`; may be the same.
        dataset: what they see.
        second_dataset: the same images at the size of the second encoder, if that is another.
        rows: of the data set; by default all.
        batch: images at a time; 4 or more.
        seed: of their order.
        device: where the encoders are; by default the CPU.

    Raises:
        DataError: if there are fewer than 4 images.
    """
    chosen = np.arange(len(dataset)) if rows is None else np.asarray(rows)
    if len(chosen) < FEWEST:
        raise DataError(f"similarity: {len(chosen)} images are too few; give {FEWEST} or more")
    order = np.random.default_rng((seed, 0xCCA)).permutation(chosen)
    parts = np.array_split(order, max(1, min(-(-len(order) // batch), len(order) // FEWEST)))
    device = device or torch.device("cpu")
    accumulated = MinibatchCKA()
    names: list[list[str]] = [[], []]
    with torch.inference_mode(), recording(first) as one, recording(second) as other:
        for part in parts:
            outputs = []
            for side, (record, images) in enumerate(((one, dataset), (other, second_dataset or dataset))):
                pixels = torch.from_numpy(np.stack([images.image(int(row)) for row in part]))
                found = record(as_float(pixels.to(device)))
                names[side] = list(found)
                outputs.append(list(found.values()))
            accumulated.update(*outputs)
    return CKAMatrix(
        accumulated.value().cpu().numpy(), names[0], names[1], images=len(order), batch=max(map(len, parts))
    )


Recorder = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@contextmanager
def recording(encoder: nn.Module) -> Iterator[Recorder]:
    """Yields a function that encodes images and returns the features of every layer; inside, the layers are hooked.

    Features are float64 [B, P]: maps [B, P, h, w] are averaged over space, tokens [B, T, P] over tokens. The last
    entry, `features`, is what the encoder returns. Layers that a call does not reach, and outputs that are no tensors
    with one row an image, are left out. Of a layer that is called several times, the last output counts.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 and tensor.is_floating_point():
            outputs.pop(name, None)
            outputs[name] = _pooled(tensor)

    def record(images: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs.clear()
        features = encoder.encode(images)  # type: ignore[operator]
        found = {name: one for name, one in outputs.items() if len(one) == len(images)}
        return found | {FEATURES: _pooled(features)}

    with ExitStack() as hooks:
        for name, module in layers(encoder):
            handle = module.register_forward_hook(partial(keep, name))
            hooks.callback(handle.remove)
        yield record


def layers(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the layers to compare, with their names: the children of the encoder, stacks of layers taken apart.

    A child with more than half of all parameters is a wrapper, such as `backbone`, and is replaced by its children; so
    are Sequential and ModuleList. Names begin below the part that all have in common.
    """
    total = sum(parameter.numel() for parameter in encoder.parameters())
    found = list(_taken_apart("", encoder, total, outermost=True))
    while found and len({name.partition(".")[0] for name, _ in found}) == 1 and all("." in name for name, _ in found):
        found = [(name.partition(".")[2], module) for name, module in found]
    return found


def _taken_apart(
    name: str, module: nn.Module, total: int, *, outermost: bool = False
) -> Iterable[tuple[str, nn.Module]]:
    own = sum(parameter.numel() for parameter in module.parameters())
    children = list(module.named_children())
    if children and (outermost or isinstance(module, CONTAINERS) or 2 * own > total):
        for child, part in children:
            yield from _taken_apart(f"{name}.{child}" if name else child, part, total)
    elif not outermost and not isinstance(module, INERT):
        yield name, module


def _pooled(output: torch.Tensor) -> torch.Tensor:
    """Returns a float64 copy [B, P]: an in-place activation may follow the layer and overwrite its output."""
    output = output.detach().to(torch.float64, copy=True)
    if output.ndim == 3:
        return output.mean(dim=1)
    return output if output.ndim == 2 else output.flatten(2).mean(dim=2)


def _u_centred(features: torch.Tensor) -> torch.Tensor:
    """Returns the U-centred Gram matrix [B, B] of features [B, P]; 0 if they are constant but for rounding."""
    count = len(features)
    centred = features - features.mean(dim=0)  # changes no U-centred matrix; large means would cost digits
    if not centred.abs().max() > CONSTANT * features.abs().max():
        return torch.zeros((count, count), dtype=features.dtype, device=features.device)
    gram = centred @ centred.T
    gram.fill_diagonal_(0)
    sums = gram.sum(dim=1) / (count - 2)
    gram = gram - sums[:, None] - sums[None, :] + sums.sum() / (count - 1)
    return gram.fill_diagonal_(0)


CELL, MARGIN, MOST = 0.34, 1.7, 14.0  # inches: of a cell, of labels and titles, of the matrix
WITH_NUMBERS = 16  # layers, up to which cells bear their values
LABELS = 40  # along an axis, at most
LETTERS = 28  # of a label


def draw_cka_matrix(matrix: CKAMatrix, first: str, second: str) -> Figure:
    """Returns a heat map, the first encoder's layers upwards and the second's to the right, on a scale from 0 to 1.

    Cells of layers with constant features are hatched.

    Args:
        matrix: what is drawn.
        first, second: names of the encoders.
    """
    rows, columns = matrix.values.shape
    cell = min(CELL, MOST / max(rows, columns))
    width, height = max(3.0, columns * cell) + MARGIN + 0.9, max(2.0, rows * cell) + MARGIN + 0.4
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = colormaps["viridis"]
    image = axes.imshow(np.clip(matrix.values, 0, 1), origin="lower", cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.patch.set(facecolor="#dddddd", edgecolor="#888888", hatch="////")  # shows through where there is no value
    for axis, labels in ((axes.yaxis, matrix.first), (axes.xaxis, matrix.second)):
        every = -(-len(labels) // LABELS)
        places = list(range(0, len(labels), every))
        axis.set_ticks(places, [_short(labels[place]) for place in places], fontsize=7)
    axes.tick_params(axis="x", rotation=90)
    axes.set_ylabel(_short(first, 60), fontsize=8)
    axes.set_xlabel(_short(second, 60), fontsize=8)
    if max(rows, columns) <= WITH_NUMBERS:
        for (row, column), value in np.ndenumerate(matrix.values):
            if np.isfinite(value):
                ink = "black" if value > 0.6 else "white"
                axes.text(column, row, _number(value), ha="center", va="center", fontsize=6, color=ink)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("CKA", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_title(f"debiased linear CKA of {matrix.images:,} images, batches of {matrix.batch:,}", fontsize=8)
    return figure


def _short(text: str, most: int = LETTERS) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"  # the end of a name tells more


def _number(value: float) -> str:
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text not in ("0.00", "-0.00") else "0"
