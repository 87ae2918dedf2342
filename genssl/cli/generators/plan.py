"""`genssl plan`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genssl.cli.options import Overrides, RecipeArgument

if TYPE_CHECKING:
    from rich.table import Table

    from genssl.offline.cost_plan import Cost


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    *,
    images: Annotated[int, typer.Option(min=1, metavar="N", help="Of the train split.", show_default=False)],
    epochs: Annotated[
        int | None, typer.Option(min=1, metavar="E", help="By default train.epochs.", show_default=False)
    ] = None,
    generator_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Variants/s of one generator.", show_default=False)
    ] = None,
    trainer_rate: Annotated[
        float | None, typer.Option(metavar="T", help="Images/s of the training, no waiting.", show_default=False)
    ] = None,
    variants: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Stored an image; by default variants.per_image, or 10.", show_default=False
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="HOURS", help="Generator-hours of the refresh; by default all there are.", show_default=False
        ),
    ] = None,
    generators: Annotated[int, typer.Option(min=1, help="How many work side by side.")] = 1,
    variant_size: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="By default as the generator says.", show_default=False)
    ] = None,
    from_run: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="A run whose measured rates are taken.", show_default=False),
    ] = None,
) -> None:
    """Tell what variants cost online, offline, and under a budget, before anything is started.

    \b
    ImageNet as in the paper: 1.28 million images, 100 epochs, 10 variants an
    image, 2.4 variants/s on an A100, 305 images/s of training:
    genssl plan simclr_sd --images 1280000 --epochs 100 --variants 10 \\
        --generator-rate 2.4 --trainer-rate 305 --variant-size 768
    online, fresh      14,815 generator-hours, 14,815 h on one generator
                       (128 keep up with the trainer)
    offline, K = 10     1,481 generator-hours, 1,598 h in all,
                       each variant seen 10 times; the next run 117 h
    budgeted refresh      117 generator-hours, 117 h in all,
                       0.8 variants an image, each seen 127 times

    \b
    genssl plan simclr_sd --images 1437 --from runs/first
    """
    import math

    from genssl.base.wording import counted
    from genssl.config.load import load
    from genssl.config.recipe import Recipe
    from genssl.errors import UserError
    from genssl.offline import cost_plan

    loaded = load(Recipe, recipe, overrides or [])
    if from_run is not None:
        measured_generator, measured_trainer = cost_plan.measured_rates(from_run)
        generator_rate, trainer_rate = generator_rate or measured_generator, trainer_rate or measured_trainer
    for option, value in (("--generator-rate", generator_rate), ("--trainer-rate", trainer_rate)):
        if value is None:
            raise UserError(f"plan: {option} is missing; give it, or a run that measured it with --from DIR")
    for option, value in (("--generator-rate", generator_rate), ("--trainer-rate", trainer_rate), ("--budget", budget)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"plan: {option} is {value:g}; a number above 0 is expected")
    assert generator_rate is not None
    assert trainer_rate is not None
    views = loaded.views_per_pair()
    if views == 0:
        raise UserError(
            "plan: no view of this recipe can be a variant, so there is nothing to plan; set views.policy: second or "
            "both and views.probability above 0"
        )
    per_image = loaded.variants.per_image
    setting = cost_plan.Setting(
        images=images,
        epochs=epochs or loaded.train.epochs,
        views=views,
        generator_rate=generator_rate,
        trainer_rate=trainer_rate,
        variants=variants or (10 if per_image == "fresh" else per_image),
        generators=generators,
        budget=budget,
        size=cost_plan.variant_size(loaded, variant_size),
    )

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a file has no edge to wrap at
        console.width = 160
    sizes = cost_plan.bytes_per_variant(setting.size)
    each = ", ".join(f"{_bytes(value)} {name if name == 'raw' else name.upper()}" for name, value in sizes.items())
    console.print(
        f"{counted(setting.images, 'image')}, {counted(setting.epochs, 'epoch')}, {counted(views, 'variant')} a pair "
        f"of views: {counted(setting.slots, 'view wants', 'views want')} one; "
        f"the training alone takes {_hours(setting.trainer_hours)}\n"
        f"{setting.generators} x {generator_rate:,.4g} variants/s against {trainer_rate:,.4g} images/s: "
        f"{counted(setting.generators_to_keep_up, 'such generator keeps', 'such generators keep')} up with the trainer"
    )
    console.print(_table(cost_plan.plan_costs(setting), setting.images, sizes))
    console.print(f"a variant of {setting.size} x {setting.size} pixels: {each}\n{cost_plan.ASSUMPTIONS}")


def _table(costs: list[Cost], images: int, sizes: dict[str, float]) -> Table:
    from rich.table import Table

    table = Table(title_justify="left")
    table.add_column("")
    for heading in ("distinct variants", "an image", "each seen", "generator", "first run", "next run", "stored: raw"):
        table.add_column(heading, justify="right")
    for name in list(sizes)[1:]:
        table.add_column(name.upper(), justify="right")
    for cost in costs:
        table.add_row(
            cost.name,
            f"{cost.distinct:,.0f}",
            f"{cost.distinct / images:,.3g}",
            f"{cost.reuse:,.3g} x",
            _hours(cost.generator_hours),
            _hours(cost.wall_hours),
            _hours(cost.next_wall_hours),
            *(_bytes(cost.stored * value) if cost.stored else "-" for value in sizes.values()),
        )
    return table


def _hours(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:,.3g} h" if hours >= 1 else f"{60 * hours:,.3g} min"


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
