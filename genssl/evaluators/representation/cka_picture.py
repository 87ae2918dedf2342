"""Draws CKA between the layers of two encoders."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from genssl.evaluators.representation.cka_matrix import CKAMatrix

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
