"""`genssl`: puts the subcommands together, and turns user errors into one message and exit code 2."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import typer

from genssl import __version__
from genssl.base.home import expand_home
from genssl.cli.catalogue import list as list_command
from genssl.cli.catalogue import recipes, runs, show, validate
from genssl.cli.generators import convert_weights, evaluate_generator, plan, pregenerate, preview, train_generator
from genssl.cli.group import Group
from genssl.cli.server import bench_server, serve_generator, top
from genssl.cli.store import store
from genssl.cli.training import compare, evaluate, export, run, similarity
from genssl.errors import UserError

app = typer.Typer(
    name="genssl",
    cls=Group,
    help="""Generative augmentation for self-supervised learning, online and offline.

    \b
    genssl recipes         # what came with genssl
    genssl run simclr_sd   # one of them: train and evaluate
    genssl COMMAND --help  # what a command takes
    """,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("compare")(compare.compare)
app.command("runs")(runs.runs)
app.command("evaluate")(evaluate.evaluate)
app.command("evaluate-generator")(evaluate_generator.evaluate_generator)
app.command("similarity")(similarity.similarity)
app.command("export")(export.export)
app.command("serve-generator")(serve_generator.serve_generator)
app.command("top")(top.top)
app.command("bench-server")(bench_server.bench_server)
app.command("pregenerate")(pregenerate.pregenerate)
app.command("plan")(plan.plan)
app.add_typer(store.app, name="store", cls=Group)
app.command("train-generator")(train_generator.train_generator)
app.command("convert-weights")(convert_weights.convert_weights)
app.add_typer(recipes.app, name="recipes", cls=Group)
app.command("preview")(preview.preview)
app.command("show")(show.show)
app.command("validate")(validate.validate)
app.command("list")(list_command.list_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"genssl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM as one exception, which leaves through every `with` block and which typer does not swallow."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted(number)


def _expanded(argument: str) -> str:
    """Returns an argument with the ~ expanded that a shell leaves in `--out=~/runs` and in what is quoted."""
    option, equals, value = argument.partition("=")
    if argument.startswith("--") and equals:
        return f"{option}={expand_home(value)}"
    return str(expand_home(argument))


def main() -> None:
    """Runs the command line; the entry point of the console script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app([_expanded(argument) for argument in sys.argv[1:]])
    except UserError as error:
        print(f"genssl: {error}", file=sys.stderr)
        sys.exit(2)
    except _Interrupted as interruption:
        print("\ngenssl: interrupted", file=sys.stderr)
        sys.exit(128 + interruption.number)
