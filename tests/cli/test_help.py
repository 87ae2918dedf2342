"""What the command line says of itself: nothing is cut at 80 columns, and every command shows how it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from genssl.cli.main import app

GROUP = typer.main.get_command(app)
COMMANDS = [
    (*path, name)
    for path, group in (((), GROUP), *(((name,), GROUP.commands[name]) for name in ("store", "recipes")))  # type: ignore[attr-defined]
    for name in group.commands
]


def helped(*command: str) -> list[str]:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80"}, terminal_width=80, prog_name="genssl")
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


@pytest.mark.parametrize("command", [(), *COMMANDS], ids=" ".join)
def test_no_line_is_cut_or_wider_than_80_columns(command):
    lines = helped(*command)
    assert [line for line in lines if len(line) > 80] == []
    assert [line for line in lines[1:] if line.endswith("...")] == [], "a sentence is cut"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != ("store",)], ids=" ".join)
def test_every_command_shows_an_example_of_itself(command):
    lines = [line.strip() for line in helped(*command)]
    assert any(line.startswith(f"genssl {' '.join(command)} ") or line == f"genssl {command[0]}" for line in lines)


def test_examples_are_of_what_a_command_takes():
    assert not any("train.epochs" in line for name in ("train-generator", "serve-generator") for line in helped(name))
    assert "such as generators/digits_flow (" in " ".join(line.strip() for line in helped("train-generator"))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["train"], "Did you mean 'train-generator'?"),
        (["trian"], "Did you mean 'train-generator'?"),
        (["bench"], "Did you mean 'bench-server'?"),
        (["serve"], "Did you mean 'serve-generator'"),
        (["store", "verfy"], "Did you mean 'verify'?"),
        (["recipes", "cpoy"], "Did you mean 'copy'?"),
        (["zzz"], "No such command 'zzz'."),
    ],
    ids=" ".join,
)
def test_a_command_that_does_not_exist_meets_what_may_be_meant(arguments, hint):
    done = CliRunner().invoke(app, arguments, prog_name="genssl")
    assert done.exit_code == 2
    assert hint in done.output


# ---- Completion ----


def environment(home: Path) -> dict[str, str]:
    """A home of its own, and a command `genssl` that is this source tree's."""
    binaries = home / "bin"
    if not binaries.is_dir():
        binaries.mkdir()
        (binaries / "genssl").write_text(
            f"#!{sys.executable}\nimport sys\nsys.argv[0] = 'genssl'\nfrom genssl.cli.main import main\nmain()\n"
        )
        (binaries / "genssl").chmod(0o755)
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "HOME": str(home), "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": root}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which a bash has installed the completion."""
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        ["bash", "-c", "genssl --install-completion; true"],
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "bash completion installed in" in done.stdout, done.stderr
    assert "genssl.sh" in (home / ".bashrc").read_text()
    return home


def completed(words: str, folder: Path, home: Path) -> set[str]:
    """Returns what bash, with the completion installed, offers for the last word."""
    script = f"""
    source "$HOME/.bashrc"
    COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    function=$(complete -p genssl); function=${{function#*-F }}; ${{function%% *}} genssl
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment(home), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_recipes(home, tmp_path):
    for name in ("mine.yaml", "mine/other.yaml", "simclr_mine.yml", "mine/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert completed("genssl pre", tmp_path, home) == {"pregenerate", "preview"}
    assert completed("genssl run --re", tmp_path, home) == {"--resume"}
    assert completed("genssl run cifar10/sim", tmp_path, home) == {"cifar10/simclr", "cifar10/simsiam"}
    shipped = {"simclr_flow", "simclr_icgan", "simclr_sd"}
    assert completed("genssl validate simclr_", tmp_path, home) == {*shipped, "simclr_mine.yml"}
    assert completed(f"genssl run {tmp_path}/mi", tmp_path, home) == set(), "the shell completes such a path itself"
    assert completed("genssl preview mi", tmp_path, home) == {"mine.yaml", "mine/other.yaml"}
