"""`genssl compare`"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genssl.cli.folders import new_folder
from genssl.cli.options import Overrides, recipe_argument
from genssl.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from genssl.config.study import LoadedStudy
    from genssl.studies.summarise import StudyRun
    from genssl.training.progress import RunProgress


def compare(
    study: Annotated[Path, recipe_argument("A study", "online_vs_offline", "STUDY")],
    overrides: Overrides = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the study; by default studies/NAME-DATE-TIME.", show_default=False),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Seeds in place of the study's.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The study's short form; its numbers mean little.")] = False,
) -> None:
    """Compare recipes: every arm of a study at every seed, paired by seed, with a report.

    \b
    genssl compare online_vs_offline --out studies/online-vs-offline
    genssl compare online_vs_offline --quick --out studies/quick
    genssl compare my-study.yaml train.epochs=100 --seeds 0,1,2 --out DIR

    Settings are of the recipe, for all arms. What is finished below --out is not run again: the same command goes on
    where it was stopped. DIR gets report.html, summary.json, summary.csv, runs.csv, figures/ and every run directory.
    """
    from genssl.config.load import load_study

    loaded = load_study(study, overrides or [], seeds=_numbers(seeds), quick=quick)
    with nullcontext(out) if out is not None else new_folder(Path("studies"), loaded.study.name) as folder:
        _compare(loaded, folder, named=out is not None)


def _compare(loaded: LoadedStudy, folder: Path, *, named: bool) -> None:
    import shlex
    import sys

    from rich.console import Console

    from genssl.cli.study_tables import study_table
    from genssl.studies.compare import compare as run_study

    console = Console(highlight=False)
    for warning in loaded.warnings():
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    watcher = Watcher(console, total=len(loaded.arms) * len(loaded.seeds))
    try:
        summary = run_study(loaded, folder, watcher)
    except Exception:
        raise
    except BaseException:  # Ctrl-C and SIGTERM
        again = shlex.join(sys.argv[1:]) + ("" if named else f" --out {shlex.quote(str(folder))}")
        watcher.note(
            f"\n{watcher.done} of {watcher.total} runs are finished and stay so; to go on, type\n  genssl {again}"
        )
        raise
    console.print(study_table(summary))
    for sentence in [*summary.verdict, *summary.cautions]:
        console.print(f"- {sentence}", soft_wrap=True)
    console.print(f"{folder}/report.html has the whole of it", soft_wrap=True)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds: {text!r} is not a list of seeds; give whole numbers, each once, such as 0,1,2")
    return [int(part) for part in parts]


class Watcher:
    """Says which run goes on, and prints a line for every one that is finished.

    Args:
        console: where it is written.
        total: how many runs there are.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.total, self.done = total, 0
        self._console = console
        self._seconds: list[float] = []

    def note(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def running(self, arm: str, seed: int) -> Iterator[RunProgress]:
        """Shows one run; without a terminal there is only the line at its end."""
        from rich.console import Console

        from genssl.training.progress import RunProgress

        outer = self

        class ArmProgress(RunProgress):
            def note(self, text: str) -> None:
                outer.note(f"{arm}, seed {seed}: {text}")

            def announce(self, *_: object) -> None:
                """Says nothing: one line a run is enough."""

        console = self._console if self._console.is_terminal else Console(quiet=True)
        with ArmProgress(console, transient=True) as progress:
            yield progress

    def skipped(self, arm: str, seed: int, why: str) -> None:
        """Counts a run that cannot be."""
        self.done += 1
        self.note(f"[{self.done}/{self.total}] {arm}, seed {seed}: left out, since {why}")

    def finished(self, run: StudyRun, *, anew: bool) -> None:
        """Counts a run, and says how long the rest will take."""
        self.done += 1
        if anew:
            self._seconds.append(run.results["seconds"])
        from genssl.evaluators.units import shown as written

        metrics: dict[str, Any] = run.metrics
        shown = "  ".join(f"{name} {written(name, value)}" for name, value in metrics.items())
        left = ""
        if self._seconds and self.done < self.total:
            minutes = (self.total - self.done) * sum(self._seconds) / len(self._seconds) / 60
            left = f"  about {minutes:.0f} min left" if minutes >= 1 else "  less than a minute left"
        how = f"{run.results['seconds']:.0f} s" if anew else "was there"
        self.note(f"[{self.done}/{self.total}] {run.arm}, seed {run.seed}: {shown}  ({how}){left}")
