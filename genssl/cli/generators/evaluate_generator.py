"""`genssl evaluate-generator`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from genssl.cli.options import Overrides, RecipeArgument
from genssl.cli.varied import varied_parameters
from genssl.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


def evaluate_generator(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    *,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="Values of a parameter of the generator; repeatable, then all combinations. By default the sweep of "
            "its family.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            metavar="ENCODER",
            help="What judges, as `genssl evaluate` takes it: a run, timm/NAME:FILE, '{encoder: dino.pth, heads: 12}' "
            "and so on; not the generator's own conditioner. Pixels suffice for small images.",
        ),
    ] = "pixels",
    sources: Annotated[int, typer.Option(min=1, help="Held-out images, drawn at random; at most so many.")] = 2000,
    variants: Annotated[int, typer.Option(min=2, help="Variants of every source.")] = 4,
    split: Annotated[
        Literal["test", "train"], typer.Option(help="Where sources come from; test is what the recipe holds out.")
    ] = "test",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write quality.json, quality.csv and quality.png there.")
    ] = None,
) -> None:
    """Measure a generator on held-out sources, beside the recipe's standard augmentations.

    \b
    genssl evaluate-generator simclr_flow --out quality
    genssl evaluate-generator simclr_sd \\
        --vary noise_level=0,200,400 --vary num_inference_steps=2,4
    genssl evaluate-generator simclr_flow \\
        generator.model=my-flow --judge runs/baseline

    Labels, where there are any, only judge. The training images serve as neighbours and for the judge, never as
    sources unless --split train.
    """
    from genssl.config.load import load
    from genssl.config.recipe import Recipe

    values = varied_parameters(vary or [])
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a directory")
    loaded = load(Recipe, recipe / "recipe.yaml" if recipe.is_dir() else recipe, overrides or [])

    from rich.console import Console

    from genssl.quality.card import CardRequest, evaluate_generator, write

    console = Console(highlight=False, markup=False)
    request = CardRequest(values, judge, sources, variants, split)
    card = evaluate_generator(loaded, request, lambda what: console.print(what, style="dim", soft_wrap=True))
    if out is not None:
        write(card, out)
    for table in _tables(card):
        console.print(table)
    for warning in card["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if out is not None:
        console.print(f"{out}/quality.png, quality.csv and quality.json: written", soft_wrap=True)


CONSISTENCY = {
    "label_agreement": "label agr.",
    "cosine": "cosine",
    "retrieval@1": "retr.@1",
    "distance_within_source": "distance",
    "vendi_per_source": "Vendi",
    "variants_per_second": "images/s",
}
REALITY = {
    "frechet": "Frechet",
    "precision": "prec.",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "nearest_train_distance": "to train",
}


def _tables(card: dict[str, Any]) -> list[Table]:
    """Returns two tables, each narrow enough for 80 columns."""
    from rich.table import Table

    from genssl.quality.picture import short

    protocol, tables = card["protocol"], []
    count, half = protocol["variants_of_a_source"], protocol["images_a_set"]
    parts = (
        (
            CONSISTENCY,
            f"{card['generator']['name']}: consistency and diversity of {count} variants of {protocol['sources']:,} "
            f"sources ({protocol['measured_on']})",
            f"judged by {protocol['judge']['name']} (labels: {protocol['label_judge']}); distance and Vendi score are "
            f"of the variants of one source, and of {count} unrelated images where real",
        ),
        (
            REALITY,
            f"{half:,} variants against {half:,} other real images",
            f"{protocol['judge_dimensions']:,} dimensions, {protocol['neighbours']} neighbours; to train: mean "
            f"distance to the nearest of {protocol['train_images_compared']:,} training images, and far below that of "
            "real images if training images are copied",
        ),
    )
    for names, title, caption in parts:
        table = Table(
            title=title, caption=caption, title_justify="left", caption_justify="left", show_edge=False, pad_edge=False
        )
        table.add_column("setting", min_width=18)
        for heading in names.values():
            table.add_column(heading, justify="right")
        for number, row in enumerate(card["rows"]):
            setting = short(row["setting"])
            table.add_row(setting, *(_cell(name, row[name]) for name in names), end_section=number in (1, 2))
        tables.append(table)
    return tables


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if name == "variants_per_second" else f"{value:.3f}"
