"""`genssl evaluate`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genssl.registry import EVALUATORS

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from genssl.config.base import ComponentConfig
    from genssl.config.recipe import Recipe
    from genssl.encoders.judge import Table


def evaluate(
    encoders: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|ENCODER...",
            help="Run directories, .safetensors files, torchvision/NAME[:WEIGHTS], timm/NAME[:FILE], FID's "
            "inception-v3[:FILE], checkpoints of solo-learn, lightly and others, or generators (a folder, or "
            "builtin:NAME), whose conditioner is judged. A block says of a checkpoint what its shapes do not, such as "
            "'{encoder: dino.pth, prefix: student}'; it takes prefix, heads, stem_padding, normalize and backbone.",
            show_default=False,
        ),
    ],
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|BLOCK",
            help="An evaluator, such as knn or '{name: knn, k: 5}'; repeatable. By default the run's own, or knn and "
            "linear_probe.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|BLOCK",
            help="A data set, such as cifar10 or '{name: folder, root: photos}'; repeatable. By default the "
            "protocol's, or the run's own. Public ones are looked for in $GENSSL_DATA, or data.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A file with data sets and evaluators, or the name of one that came with genssl, such as "
            "linear_probe/paper; repeatable.",
        ),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|RECIPE",
            help="Whose generator makes the variants for frechet, prdc and others; by default that of the encoder's "
            "own run. So variants can be judged by an encoder that has seen none, such as timm/NAME.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write evaluation.csv and evaluation.json there.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="BLOCK",
            help="The network of a checkpoint whose shapes do not tell it, such as '{name: resnet18, stem: small}'.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Image statistics of a checkpoint: imagenet, inception (0.5 for all), cifar10, cifar100 or none; by "
            "default what it says.",
            show_default=False,
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The network that is meant, of several in a checkpoint: how the names of its tensors begin.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Of the ViT of a checkpoint; by default one for 64 channels.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch weights of torchvision and timm that are not on this machine.")
    ] = False,
) -> None:
    """Judge frozen encoders on data sets: one table, with the protocol of every number.

    \b
    genssl evaluate runs/baseline-1
    genssl evaluate runs/baseline-1 runs/online-1 --out transfer \\
        --evaluator linear_probe --evaluator '{name: knn, k: 5}'
    genssl evaluate barlow-cifar10.ckpt \\
        --dataset cifar10 --dataset '{name: dtd, root: /data, download: true}'
    genssl evaluate torchvision/resnet50:IMAGENET1K_V2 \\
        --protocol linear_probe/paper
    genssl evaluate dino.pth '{encoder: dino.pth, prefix: student}' \\
        --dataset cifar10
    genssl evaluate timm/NAME:FILE --dataset cifar10 \\
        --variants runs/online-1 --evaluator frechet
    """
    from genssl.config.encoder import NORMALIZATIONS
    from genssl.config.load import load, parse_blocks
    from genssl.config.protocol import Protocol
    from genssl.errors import UserError, suggest

    datasets, evaluators = parse_blocks("dataset", dataset or []), parse_blocks("evaluator", evaluator or [])
    network = parse_blocks("backbone", [backbone])[0] if backbone is not None else None
    if normalize not in (None, *NORMALIZATIONS):
        raise UserError(f"--normalize {normalize}: is not known{suggest(str(normalize), NORMALIZATIONS)}")
    work: list[tuple[list[ComponentConfig], list[ComponentConfig]]] = []
    told = [load(Protocol, path) for path in protocol or []]
    for one in told:
        chosen = selected(datasets, one.datasets, [config.name for other in told for config in other.datasets])
        if chosen:
            work.append((chosen, evaluators or list(one.evaluate)))
    variants_of = None if variants is None else _with_generator(variants)
    names = [name.rstrip("/") for name in encoders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{twice[0]} is given twice; give every encoder once")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a directory")

    from rich.console import Console

    from genssl.base.devices import pick_device
    from genssl.cli.training.encoders import load_encoders
    from genssl.encoders.judge import transfer

    where, console = pick_device(device), Console(highlight=False, markup=False)
    settings = {"backbone": network, "normalize": normalize, "prefix": prefix, "heads": heads}
    loaded = load_encoders(names, where, console, **settings, download=download)
    table = transfer(
        loaded,
        work or [(datasets, evaluators)],
        where,
        report=lambda what: console.print(what, style="dim", soft_wrap=True),
        variants_of=variants_of,
        keep=lambda table: table.write(out) if out is not None else None,
    )
    console.print(_shown(table))
    for line in [*_protocols(table), *_generators(table)]:
        console.print(line, style="dim", soft_wrap=True)
    if out is not None:
        console.print(f"{out}/evaluation.csv and evaluation.json have the whole of it", soft_wrap=True)


def _with_generator(path: Path) -> Recipe:
    """Returns the recipe of a run directory, or in a file.

    Raises:
        UserError: if it has no generator.
    """
    from genssl.config.load import load
    from genssl.config.recipe import Recipe
    from genssl.errors import UserError

    recipe = load(Recipe, path / "recipe.yaml" if path.is_dir() else path)
    if recipe.generator is None:
        raise UserError(f"--variants {path}: has no generator; name a run or a recipe that has one")
    return recipe


def selected(
    given: Sequence[ComponentConfig], datasets: Sequence[ComponentConfig], known: Sequence[str]
) -> list[ComponentConfig]:
    """Returns the data sets that a protocol's evaluators judge on.

    Args:
        given: on the command line. A name alone selects the protocol's block of that name; a block with settings, or a
            name that no protocol has, is taken as it is.
        datasets: the protocol's; all of them are taken where none is given.
        known: names of those of all protocols.
    """
    if not given:
        return list(datasets)
    chosen: list[ComponentConfig] = []
    for config in given:
        alone = config.model_fields_set <= {"name"}
        if alone and config.name in known:
            chosen += [block for block in datasets if block.name == config.name]
        else:
            chosen.append(config)
    return chosen


def _shown(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    from genssl.evaluators.units import shown as written

    shown = RichTable(show_edge=False)  # which leaves room for the longest metric in 80 columns
    several = len(table.encoders) > 1
    for heading in (*(["encoder"] if several else []), "data set", "evaluator", "metric"):
        shown.add_column(heading, overflow="fold")
    shown.add_column("value", justify="right")
    shown.add_column("protocol")
    before = None
    for row in table.rows:
        if before is not None and (row.encoder, row.dataset) != before:
            shown.add_section()
        before = (row.encoder, row.dataset)
        cells = [row.encoder] if several else []
        value = written(f"{row.evaluator}/{row.metric}", row.value)
        shown.add_row(*cells, row.dataset, row.evaluator, row.metric, value, row.protocol)
    return shown


def _protocols(table: Table) -> list[str]:
    """Returns a line for each protocol id."""
    lines = []
    for name, facts in table.protocols.items():
        settings = ", ".join(f"{key} {value}" for key, value in _telling(facts["evaluator"]).items())
        data = facts["dataset"]
        lines.append(
            f"{name}: {facts['evaluator']['name']} ({settings}) on {data['name']}, {data['tested_on']}: "
            f"{data['train']['images']:,} + {data['test']['images']:,} images of {data['image_size']} pixels"
        )
    return lines


def _generators(table: Table) -> list[str]:
    """Returns a line for each generator whose variants were judged, or seen beside real images."""
    lines = []
    judged = {row.encoder for row in table.rows if _sees_variants(row.facts)}
    for name in judged & set(table.encoders):
        made_by = table.encoders[name].get("variants_by")
        if made_by is not None:
            model = f" {made_by['model']}" if "model" in made_by else ""
            lines.append(f"variants seen by {name}: {made_by['name']}{model}")
    return sorted(lines)


def _sees_variants(facts: dict[str, Any]) -> bool:
    return facts.get("variant_index") is not None or "variants_of_a_source" in facts


def _telling(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that a line has room for: plain values, and lists that are not the default."""
    fields = EVALUATORS.config(settings["name"]).model_fields
    return {
        key: value
        for key, value in settings.items()
        if key != "name"
        and value is not None
        and not isinstance(value, dict)
        and (not isinstance(value, list) or value != fields[key].default)
    }
