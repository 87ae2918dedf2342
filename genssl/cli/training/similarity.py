"""`genssl similarity`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from genssl.config.base import ComponentConfig
    from genssl.data.base import ImageDataset
    from genssl.encoders.load import LoadedEncoder
    from genssl.evaluators.representation.compare_encoders import Similarity

IMAGES = 2000


def similarity(
    first: Annotated[
        str,
        typer.Argument(
            metavar="ENCODER",
            help="As `genssl evaluate` takes it: a run directory, a .safetensors file, torchvision/NAME[:WEIGHTS], a "
            "checkpoint, or a block such as '{encoder: dino.pth, prefix: student}'.",
        ),
    ],
    second: Annotated[str, typer.Argument(metavar="ENCODER", help="Another, or the same.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|BLOCK",
            help="What they see, such as cifar10 or '{name: folder, root: photos}'; by default the data set of the "
            "first run.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data set: train or test.")] = "test",
    images: Annotated[int, typer.Option(min=20, help="Drawn at random; all if there are fewer.")] = IMAGES,
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap over images.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the images, the batches and the bootstrap.")] = 0,
    batch: Annotated[int, typer.Option(min=4, help="Images in a batch of the matrix over layers.")] = 256,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write similarity.json and cka_layers.png there.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    download: Annotated[
        bool, typer.Option("--download", help="Fetch weights of torchvision and timm that are not on this machine.")
    ] = False,
) -> None:
    """Compare what two encoders represent: CKA and orthogonal Procrustes distance, with 95 % intervals.

    \b
    genssl similarity runs/baseline-1 runs/online-1
    genssl similarity dino.pth '{encoder: dino.pth, prefix: student}' \\
        --dataset cifar10
    genssl similarity runs/baseline-1 torchvision/resnet18:IMAGENET1K_V1 \\
        --out similarity
    """
    from genssl.errors import UserError, suggest

    if split not in ("train", "test"):
        raise UserError(f"--split {split}: is not known{suggest(split, ('train', 'test'))}")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a directory")
    from genssl.config.load import parse_blocks

    given = parse_blocks("dataset", [dataset])[0] if dataset is not None else None

    from rich.console import Console

    from genssl.base.devices import pick_device
    from genssl.cli.training.encoders import load_encoders
    from genssl.evaluators.base import FrozenEncoder
    from genssl.evaluators.representation.cka_matrix import cka_matrix
    from genssl.evaluators.representation.compare_encoders import compare_encoders
    from genssl.evaluators.representation.rankme import drawn_rows

    where, console = pick_device(device), Console(highlight=False)
    pair = load_encoders((first, second), where, console, download=download)
    config = given if given is not None else _data_of_a_run(pair)
    a, b = (_dataset(config, split, encoder.image_size, sized=given is not None) for encoder in pair)
    rows = drawn_rows(a, images, "similarity", seed)
    one, other = (FrozenEncoder(encoder.module, where) for encoder in pair)
    found = compare_encoders(one, other, a, b, rows=rows, resamples=resamples, seed=seed)
    console.print(_table(pair, found))
    console.print(_said(found, f"{found.images:,} images of {config.name}, {split}"), soft_wrap=True)
    if out is not None:
        matrix = cka_matrix(pair[0].module, pair[1].module, a, b, rows=rows, batch=batch, seed=seed, device=where)
        data = {"dataset": config.model_dump(mode="json"), "split": split, "sizes": [a.image_size, b.image_size]}
        _write(out, pair, found, matrix, data)
        console.print(f"{out}/similarity.json has the numbers, {out}/cka_layers.png the layers", soft_wrap=True)


def _data_of_a_run(encoders: list[LoadedEncoder]) -> ComponentConfig:
    from genssl.encoders.judge import recipe_of
    from genssl.errors import UserError

    for encoder in encoders:
        if (recipe := recipe_of(encoder)) is not None:
            return recipe.dataset
    names = " nor ".join(encoder.name for encoder in encoders)
    raise UserError(f"neither {names} comes from a run, so there is no data set to see; name one: --dataset")


def _dataset(config: ComponentConfig, split: Any, image_size: int | None, *, sized: bool) -> ImageDataset:
    """Loads the split at the size that the encoder was made for.

    Args:
        config: of the data set.
        split: train or test.
        image_size: of the encoder, or None if any size will do.
        sized: an image_size in the config was meant for this comparison, and holds.
    """
    from genssl.data.load import load_dataset, of_size
    from genssl.evaluators.representation.compare_encoders import Resized

    if image_size is None or (sized and "image_size" in config.model_fields_set):
        return load_dataset(config, split)
    loaded = load_dataset(of_size(config, image_size), split)
    return loaded if loaded.image_size == image_size else Resized(loaded, image_size)


def _table(pair: list[LoadedEncoder], found: Similarity) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{pair[0].name} and {pair[1].name}"), title_justify="left")
    for heading in ("measure", "value", "95 % interval", "equal", "unlike"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for name, one, equal, unlike in (
        ("CKA, debiased", found.cka_debiased, "1", "0"),
        ("CKA, biased", found.cka_biased, "1", "0"),
        ("Procrustes distance", found.opd, "0", "2"),
    ):
        table.add_row(name, f"{one.value:.4f}", f"{one.low:.4f} .. {one.high:.4f}", equal, unlike)
    table.add_row("  with the paper's centring", f"{found.opd_legacy:.4f}", "", "0", "2")
    return table


def _said(found: Similarity, what: str) -> str:
    text = (
        f"{what}; {found.dimensions[0]:,} and {found.dimensions[1]:,} features; intervals by {found.resamples:,} "
        f"resamples of the images ({found.opd_resamples:,} for the distance), seed {found.seed}"
    )
    if found.images <= max(found.dimensions):
        text += "\nno more images than features: only the debiased CKA means something on its own"
    return text


def _write(out: Path, pair: list[LoadedEncoder], found: Similarity, matrix: Any, data: dict[str, Any]) -> None:
    import math
    from dataclasses import asdict

    from genssl.base.files import write_atomically, write_json
    from genssl.evaluators.representation.cka_matrix import draw_cka_matrix

    out.mkdir(parents=True, exist_ok=True)
    figure = draw_cka_matrix(matrix, pair[0].name, pair[1].name)
    write_atomically(out / "cka_layers.png", lambda path: figure.savefig(path, format="png"))
    content = {
        "encoders": [{"name": encoder.name, **encoder.source} for encoder in pair],
        **data,
        **asdict(found),
        "interval": "95 %, percentiles of a bootstrap over images; of the biased CKA and the distances moved so that "
        "the resamples' mean is the estimate",
        "layers": {
            "estimate": "debiased CKA over batches, divided once",
            "first": matrix.first,
            "second": matrix.second,
            "images": matrix.images,
            "batch": matrix.batch,
            "cka": [[None if math.isnan(value) else value for value in row] for row in matrix.values.tolist()],
        },
    }
    write_json(out / "similarity.json", content)
