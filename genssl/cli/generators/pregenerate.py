"""`genssl pregenerate`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from genssl.base.wording import counted
from genssl.cli.options import Overrides, RecipeArgument

if TYPE_CHECKING:
    from rich.console import Console

    from genssl.offline.pregenerate import Pregenerated

LINE_SECONDS = 10.0  # between lines where there is no terminal


def pregenerate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    *,
    store: Annotated[Path, typer.Option(help="Folder of the store; made if it is absent.", show_default=False)],
    variants: Annotated[
        int, typer.Option(min=1, metavar="K", help="Variants 0..K-1 of each image.", show_default=False)
    ],
    shard: Annotated[
        str | None,
        typer.Option(metavar="i/n", help="Part i (from 0) of n; by default torchrun's rank.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=4096, help="Variants in a request and a transaction.")] = 64,
    encoding: Annotated[Literal["raw", "png"], typer.Option(help="Of the stored images; png is lossless.")] = "raw",
    check: Annotated[bool, typer.Option("--check", help="Read what is stored, and make damaged ones again.")] = False,
) -> None:
    """Fill a variant store ahead of training; start it again to go on where it stopped.

    \b
    genssl pregenerate simclr_sd --store variants --variants 10
    genssl pregenerate simclr_sd variants.source=in_process \\
        --store variants --variants 10 --shard 0/4
    torchrun --nproc-per-node 8 -m genssl pregenerate \\
        simclr_sd --store variants --variants 10
    genssl run simclr_sd variants.source=stored \\
        variants.store=variants variants.per_image=10

    Generates through the recipe's server, or in this process unless variants.source is online. What is in the store is
    not made again. Several processes, on several shards or on the same one, may fill one store at once; on one CPU give
    each its share of the cores with train.threads=N (torchrun's ranks share them by themselves).
    """
    from genssl.config.load import load
    from genssl.config.recipe import Recipe

    loaded = load(Recipe, recipe, overrides or [])

    from rich.console import Console

    from genssl.offline.pregenerate import parse_shard
    from genssl.offline.pregenerate import pregenerate as generate

    part = parse_shard(shard)
    console = Console(highlight=False)
    with Progress(console) as progress:
        try:
            done = generate(
                loaded,
                store,
                variants=variants,
                report=progress,
                shard=part,
                rows=rows,
                encoding=encoding,
                check=check,
            )
        except Exception:
            raise
        except BaseException:  # Ctrl-C and SIGTERM
            progress.interrupted()
            raise
    rate = f" at {done.made / done.seconds:,.1f}/s" if done.seconds > 0 else ""
    console.print(
        f"{store}: has all {counted(done.total, 'variant')}{f' of shard {shard}' if shard else ''}; "
        f"{counted(done.made, 'was', 'were')} made now{rate}, {counted(done.there, 'was', 'were')} there already",
        soft_wrap=True,
    )


class Progress:
    """A live line on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        from genssl.training.progress import TwoLines

        self._console = console
        self._bar = TwoLines(console)
        self._bar.facts = "the generator is loading"
        self._task = self._bar.add_task("variants", total=None)
        self._done: Pregenerated | None = None
        self._said = 0.0

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Prints a line."""
        self._bar.console.print(text, soft_wrap=True)

    def start(self, done: Pregenerated) -> None:
        """Says what there is to do."""
        self._done = done
        self._bar.facts = ""
        self._bar.reset(self._task, total=done.total, completed=done.there)
        if not self._console.is_terminal:
            self.note(
                f"{counted(done.total, 'variant')}, {counted(done.there, 'of them is', 'of them are')} there already"
            )

    def advance(self, done: Pregenerated) -> None:
        """Shows how far it is."""
        from genssl.training.progress import duration

        self._done = done
        rate = done.made / done.seconds if done.seconds > 0 else 0.0
        left = done.total - done.there - done.made
        facts = f"{rate:,.1f}/s, {duration(left / rate) if rate else '?'} left, {done.there:,} were there already"
        self._bar.facts = facts
        self._bar.update(self._task, completed=done.there + done.made)
        if not self._console.is_terminal and done.seconds - self._said >= LINE_SECONDS:
            self._said = done.seconds
            self.note(f"{done.there + done.made:,} of {done.total:,} variants, {facts}")

    def interrupted(self) -> None:
        """Says what was done and how to go on."""
        import shlex
        import sys

        if self._done is None:
            return
        stored = self._done.made + self._done.there
        self.note(
            f"\n{stored:,} of {self._done.total:,} variants are stored and stay so; to make the others, type\n"
            f"  genssl {shlex.join(sys.argv[1:])}"
        )
