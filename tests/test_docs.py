"""What README and the pages in docs/ say of the project's own files and commands."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from genssl.cli.main import app
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile
from genssl.config.study import Study

ROOT = Path(__file__).resolve().parent.parent
PROMISES = (ROOT / "docs/promises.md").read_text()
ROWS = [line for line in PROMISES.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]


def functions(path: Path) -> dict[str, bool]:
    """Returns the tests of a file, and of each whether it is slow."""
    tree = ast.parse(path.read_text())
    return {
        node.name: any(ast.unparse(decorator) == "pytest.mark.slow" for decorator in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:60])
def test_every_promise_names_tests_that_there_are(row):
    promise, under, tests = (cell.strip() for cell in row.strip("|").split("|"))
    assert promise
    assert under
    named = re.findall(r"`(?:([\w/]+\.py))?::(\w+)`", tests)
    assert named
    file, slow = "", []
    for path, test in named:
        file = path or file
        found = functions(ROOT / "tests" / file)
        assert test in found, f"{file} has no {test}"
        slow.append(found[test])
    assert ("*slow*" in tests) == any(slow)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = {
    "run": Recipe,
    "preview": Recipe,
    "pregenerate": Recipe,
    "plan": Recipe,
    "evaluate-generator": Recipe,
    "train-generator": GeneratorRecipe,
    "serve-generator": ServerFile,
    "compare": Study,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Returns every `genssl` command of the pages, as (page, command), with seeds and names of loops filled in."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`(genssl [a-z][^`]*?)`", page.read_text())
        lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
        parts = [part.strip() for line in lines for part in re.split(r"; (?:do )?| && ", line.split(" # ")[0])]
        written = [part.removeprefix("torchrun --nproc-per-node 4 -m ") for part in parts] + inline
        for command in (
            part.replace("$seed", "0").replace("$source", "none").replace("$name", "flow") for part in written
        ):
            if command.startswith("genssl "):
                found.append((page.name, " ".join(command.split())))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value)
def test_every_command_is_one_that_genssl_takes(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    with click.Context(group) as context:
        called = group.get_command(context, name)
        assert called is not None
        if isinstance(called, click.Group):
            assert not arguments or called.get_command(context, arguments[0]) is not None
            return
        if arguments in ([], ["..."], ["RECIPE"], ["FILE"]) or arguments[:1] == ["RECIPE"] or "RUN" in arguments:
            return  # the command is named, and not given
        given = called.make_context(name, list(arguments)).params
    if name in MODELS and (file := given.get("recipe") or given.get("file") or given.get("study")):
        load(MODELS[name], file, given["overrides"] or [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_no_example_gives_ones_own_pictures_to_the_generator_of_the_digits():
    for _, command in commands():
        words = shlex.split(command)
        if "photos" in command and words[1] in ("run", "preview", "pregenerate", "evaluate-generator"):
            recipe = load(Recipe, ROOT / words[2], [word for word in words[3:] if "=" in word.split("{")[0]])
            assert not str(getattr(recipe.generator, "model", "")).startswith("builtin:"), command


def test_readme_is_a_first_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
