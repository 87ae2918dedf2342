"""What README and the pages in docs/ say of the project's own files and commands."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer.main

import genssl
from genssl.cli.main import app
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.load import load, load_study
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile
from genssl.config.study import Study
from genssl.registry import REGISTRIES

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


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "findings/README.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
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
                found.append((page.relative_to(ROOT).as_posix(), " ".join(command.split())))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value)
def test_every_command_is_one_that_genssl_takes(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    with click.Context(group) as context:
        called = group.get_command(context, name)  # type: ignore[attr-defined]
        assert called is not None
        if isinstance(called, click.Group):
            assert not arguments or called.get_command(context, arguments[0]) is not None
            return
        if arguments in ([], ["..."], ["RECIPE"], ["FILE"]) or arguments[:1] == ["RECIPE"] or "RUN" in arguments:
            return  # the command is named, and not given
        given = called.make_context(name, list(arguments)).params
    if page == "CONTRIBUTING.md" and "=stripes" in command:
        return  # of plug-ins; tests/test_contributing.py runs it
    if name in MODELS and (file := given.get("recipe") or given.get("file") or given.get("study")):
        load(MODELS[name], file, given["overrides"] or [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
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


# ---- Troubleshooting ----


def texts() -> list[str]:
    """Returns every text of the code, with an ellipsis for what is filled in."""
    found = []
    for path in (ROOT / "genssl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
    return found


QUOTES = re.findall(r"^> (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def all_texts() -> list[str]:
    return texts()


@pytest.mark.parametrize("quote", QUOTES)
def test_every_quoted_error_stands_in_the_code(quote, all_texts):
    first, *rest = quote.split("…")
    found = [text for text in all_texts if first in text and all(part in text for part in rest)]
    assert found, "reworded? then change the page too"


def test_every_advice_follows_a_quote():
    assert len(QUOTES) > 20
    for part in re.split(r"^> .+$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)[1:]:
        assert part.split("\n## ")[0].strip()


# ---- Architecture ----

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
PLACES = sorted(set(re.findall(r"`((?:genssl|proto)/[\w/.]+)`", ARCHITECTURE)))


def test_the_walk_of_a_variant_is_short():
    walk = ARCHITECTURE.split("## The walk of a variant\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. `(genssl/[\w/]+\.py)`: (.*)$", walk, re.MULTILINE)
    assert 1 < len(steps) <= 12
    assert len({file for file, _ in steps}) == len(steps)
    for file, said in steps:
        for name in re.findall(r"`([A-Z]\w+)[.`]", said):
            assert f"class {name}" in (ROOT / file).read_text(), f"{file} has no {name}"


@pytest.mark.parametrize("place", PLACES)
def test_every_place_that_is_named_is_there(place):
    if "NAME" not in place:
        assert (ROOT / place).exists()


def test_the_floors_are_those_that_imports_are_held_to():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [re.findall(r"genssl\.(\w+)", layer) for layer in contract["layers"]]
    table = ARCHITECTURE.split("| floor | rooms |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert [re.findall(r"`(\w+)`", row) for row in table] == [rooms for rooms in layers if rooms != ["__main__"]]


def test_the_example_of_a_study_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(name: my-noise.*?)```", (ROOT / "docs/studies.md").read_text(), re.DOTALL)
    (tmp_path / "simclr_sd.yaml").write_bytes((ROOT / "recipes/simclr_sd.yaml").read_bytes())
    (tmp_path / "study.yaml").write_text(text)
    assert [arm.arm.name for arm in load_study(tmp_path / "study.yaml").arms] == ["none", "low", "high"]


# ---- Numbers and names ----


def test_the_version_is_that_of_the_changelog():
    newest = re.search(r"^## (\S+) - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == genssl.__version__


def test_every_name_of_the_tables_has_its_page():
    for kind in ("methods", "generators"):
        names = {name for name, _, origin in REGISTRIES[kind].describe() if origin == "genssl"}
        pages = {path.stem for path in (ROOT / "docs" / kind).glob("*.md")}
        assert pages == names
        said = (ROOT / f"docs/{kind}.md").read_text()
        assert set(re.findall(rf"^{kind}/(\w+)$", said, re.MULTILINE)) == names


def test_findings_show_what_their_readme_asks_for():
    for path in (ROOT / "findings").glob("*.sh"):
        lines = path.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash"
        assert lines[1].startswith("# ")
