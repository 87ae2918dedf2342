"""Parts of the pages that are made of the code: tables of registries, settings, commands, recipes, modules.

Each directive writes Markdown and has it parsed in its place, so that nothing here can go stale and nothing is written
twice. Needs no GPU; imports torch for the pages that show classes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main
from docutils import nodes
from docutils.statemachine import StringList
from docutils.utils.math import latex2mathml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

import genssl
from genssl.cli.main import app as command_line
from genssl.config.base import ComponentConfig, Kind
from genssl.config.documents.document import read_document
from genssl.config.documents.shipped import headline, recipes_folder
from genssl.registry import REGISTRIES

ROOT = Path(genssl.__file__).resolve().parent.parent


# ---- Text ----


def cell(text: object) -> str:
    """Returns text as the content of a cell of a Markdown table."""
    return re.sub(r"[ \n]+", " ", str(text)).strip().replace("|", "\\|").replace("<", "&lt;")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Returns the lines of a Markdown table without the columns that are empty in all rows."""
    head, body = list(head), [[cell(value) for value in row] for row in rows]
    kept = [place for place in range(len(head)) if any(row[place] for row in body)]
    lines = [[head[place] for place in kept], ["---"] * len(kept), *([row[place] for place in kept] for row in body)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def docstring(thing: Any) -> str:
    """Returns a docstring as Markdown, without the sections of arguments."""
    text = inspect.getdoc(thing) or ""
    return re.split(r"\n\n(?:Args|Returns|Raises|Attributes|Policies):\n", text)[0]


def first_sentence(text: str) -> str:
    """Returns the first paragraph's first sentence."""
    return re.split(r"(?<=[.:;]) (?=[A-Z`])", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0].rstrip(":;")


# ---- Settings ----


def type_name(annotation: Any) -> str:
    """Returns a field's type in the words of a YAML file."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(part) for part in arguments if part is not type(None)))
    if origin in (list, tuple):
        inner = list(dict.fromkeys(type_name(part) for part in arguments if part is not Ellipsis))
        return "list of " + " or ".join(inner)
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block {name: ...}" if annotation is ComponentConfig else "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def limits(metadata: Iterable[Any]) -> str:
    """Returns a field's bounds."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign}\u00a0{getattr(item, name):,}"
        for item in metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join(found)


def kind_of(field: Any) -> str:
    """Returns the registry whose names a field's block takes, or nothing."""
    marks = [*field.metadata, *typing.get_args(field.annotation)]
    return next((f"one of the {mark.kind}" for mark in marks if isinstance(mark, Kind)), "")


def default_of(field: Any) -> str:
    """Returns what stands where a file says nothing."""
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel):
        return "its defaults"
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def settings(model: type[BaseModel], *, without: frozenset[str] = frozenset({"name"})) -> list[str]:
    """Returns a table of a model's fields."""
    rows = []
    for name, field in model.model_fields.items():
        if name in without:
            continue
        shape = kind_of(field) or type_name(field.annotation)
        bounds = limits(field.metadata)
        rows.append(
            (f"`{name}`", shape + (f", {bounds}" if bounds else ""), default_of(field), field.description or "")
        )
    return table(["setting", "takes", "default", "meaning"], rows) if rows else ["It has no settings.", ""]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Returns the model of a field that is a section with settings of its own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return None if annotation is ComponentConfig else annotation
    return next(filter(None, map(section_of, typing.get_args(annotation))), None)


def document_settings(
    model: type[BaseModel], level: int, path: str = "", without: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yields the settings of a document, then those of its sections, each under a heading of its own."""
    yield from settings(model, without=without)
    for name, field in model.model_fields.items():
        if name in without:
            continue
        inner = section_of(field.annotation)
        if inner is not None:
            here = f"{path}.{name}" if path else name
            yield from [f"{'#' * min(level, 6)} `{here}`", "", *docstring(inner).splitlines(), ""]
            yield from document_settings(inner, level + 1, here)


def resolve(reference: str) -> Any:
    """Returns what `package.module:name` means."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


# ---- Recipes ----


def recipes() -> list[tuple[str, Path, dict[str, Any]]]:
    """Returns name, file and content of the recipes that ship."""
    folder = recipes_folder()
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return [(path.relative_to(folder).with_suffix("").as_posix(), path, read_document(path).data) for path in paths]


def names_in(block: Any) -> str:
    """Returns the name of a `{name: ...}` block, however it is written."""
    return block if isinstance(block, str) else str((block or {}).get("name", ""))


def recipes_with(section: str, name: str) -> list[str]:
    """Returns a list of the recipes whose section has that name."""
    found = [(label, path) for label, path, data in recipes() if names_in(data.get(section)) == name]
    return [f"- `{label}`: {headline(path)}" for label, path in found] + [""]


# ---- Directives ----


class Written(SphinxDirective):
    """A directive whose content is Markdown that it writes itself."""

    required_arguments = 0
    optional_arguments = 2
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Parses what `lines` returns, in the place of the directive."""
        lines = list(self.lines())
        first = next((place for place, line in enumerate(lines) if line.startswith("#")), len(lines))
        before = self._parsed(lines[:first])
        if first == len(lines):
            return before
        # MyST puts sections into the page itself, at once: what stands before them must be there already.
        self.state._renderer.current_node.extend(before)
        return self._parsed(lines[first:])

    def _parsed(self, lines: list[str]) -> list[nodes.Node]:
        container = nodes.container()
        container.document = self.state.document
        text = StringList(lines, source=f"<{self.name}>")
        self.state.nested_parse(text, self.content_offset, container, match_titles=True)
        return container.children

    def lines(self) -> Iterable[str]:
        """Returns the lines of Markdown."""
        raise NotImplementedError


class RegistryTable(Written):
    """What recipes can name of one kind."""

    def lines(self) -> Iterable[str]:
        """Returns a table."""
        registry = REGISTRIES[self.arguments[0]]
        pages = self.arguments[1] if len(self.arguments) > 1 else ""
        details = registry.details()
        return table(
            ["name", "what it is", "licence of the weights", "cost"],
            (
                (f"[`{name}`]({pages}/{name}.md)" if pages else f"`{name}`", summary, *details.get(name, ("", "")))
                for name, summary, origin in registry.describe()
                if origin == "genssl"
            ),
        )


class ComponentSettings(Written):
    """The settings of one registered thing, or of every one of a kind."""

    def lines(self) -> Iterable[str]:
        """Returns a table, or one under a heading for each."""
        registry = REGISTRIES[self.arguments[0]]
        if len(self.arguments) > 1:
            return settings(registry.config(self.arguments[1]))
        lines: list[str] = []
        for name, _, origin in registry.describe():
            if origin == "genssl":
                model = registry.config(name)
                lines += [f"### `{name}`", "", *docstring(model).splitlines(), "", *settings(model)]
        return lines


class DocumentSettings(Written):
    """All settings of a kind of file; with a second model, only those that this one lacks."""

    def lines(self) -> Iterable[str]:
        """Returns tables under headings."""
        known = resolve(self.arguments[1]).model_fields if len(self.arguments) > 1 else ()
        return document_settings(resolve(self.arguments[0]), 3, without=frozenset(known))


class Component(Written):
    """What the code says of a method or a generator: its module, its loss, its settings, its recipes."""

    def lines(self) -> Iterable[str]:
        """Returns Markdown under headings."""
        kind, name = self.arguments
        target = REGISTRIES[kind].get(name)
        module = inspect.getmodule(target)
        assert module is not None
        summary, *rest = (inspect.getdoc(module) or "").split("\n\n")
        yield from [*summary.splitlines(), ""]
        if kind == "methods":
            losses = [
                thing for thing in vars(module).values() if getattr(thing, "__module__", "") == "genssl.methods.losses"
            ]
            yield from ["", "## Loss", ""]
            for loss in losses:
                yield from [f"`{loss.__name__}` in `genssl/methods/losses.py`: {docstring(loss)}", ""]
            yield from ["## Deviations, and generated views", ""]
        for paragraph in rest:
            yield from [*paragraph.splitlines(), ""]
        place = Path(module.__file__ or "").resolve()
        yield from [f"The code is in `{place.relative_to(ROOT).as_posix()}`.", ""]
        licence, cost = REGISTRIES[kind].details().get(name, ("", ""))
        if licence:
            yield from [f"Licence of the weights: {licence}.", ""]
        if cost:
            yield from [f"Cost: {cost}.", ""]
        model = REGISTRIES[kind].config(name)
        yield from ["## Settings", "", *docstring(model).splitlines(), "", *settings(model)]
        used = recipes_with("method" if kind == "methods" else "generator", name)
        if kind == "generators":
            trained = [
                f"- `{label}`: {headline(path)}" for label, path, data in recipes() if data.get("family") == name
            ]
            used = [*trained, *used]
        if any(used):
            yield from ["## Recipes that ship", "", *used]


class RecipeList(Written):
    """The recipes that ship."""

    def lines(self) -> Iterable[str]:
        """Returns a table."""
        return table(["name", "what it is"], ((f"`{label}`", headline(path)) for label, path, _ in recipes()))


class Commands(Written):
    """The reference of the command line."""

    def lines(self) -> Iterable[str]:
        """Returns a section a command."""
        group = typer.main.get_command(command_line)
        yield from self._group(group, group.make_context("genssl", [], resilient_parsing=True))

    def _group(self, group: Any, context: Any) -> Iterator[str]:
        for name, command in group.commands.items():
            if command.hidden:
                continue
            inner = command.make_context(name, [], parent=context, resilient_parsing=True)
            yield from [f"## `{inner.command_path}`", ""]
            yield from self._help(command.help or "")
            if hasattr(command, "commands"):
                yield from self._group(command, inner)
                continue
            rows = []
            for parameter in command.get_params(inner):
                meaning = getattr(parameter, "help", None) or ""
                if parameter.param_type_name == "option":
                    flags = ", ".join(f"`{flag}`" for flag in [*parameter.opts, *parameter.secondary_opts])
                    default = None if parameter.is_flag or callable(parameter.default) else parameter.default
                    rows.append((flags, meaning, "" if default in (None, (), []) else f"`{default}`"))
                else:
                    rows.append((f"`{parameter.metavar or parameter.human_readable_name}`", meaning, ""))
            yield from table(["argument or option", "meaning", "default"], rows)

    @staticmethod
    def _help(text: str) -> Iterator[str]:
        """Yields a help text, its unwrapped blocks as blocks of code."""
        for paragraph in text.strip().split("\n\n"):
            if paragraph.lstrip().startswith("\b"):
                block = paragraph.replace("\b", "", 1).strip("\n").splitlines()
                yield from ["```text", *block, "```", ""]
            else:
                yield from [*paragraph.splitlines(), ""]


class Modules(Written):
    """The files of a package and the first sentence of each."""

    def lines(self) -> Iterable[str]:
        """Returns a table of a package's modules, or of the packages of genssl."""
        if not self.arguments:
            yield from table(["room", "what is in it"], self._packages())
            return
        folder = ROOT / self.arguments[0]
        files = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
        rows = ((f"`{path.relative_to(ROOT).as_posix()}`", self._says(path)) for path in files)
        yield from table(["file", "what is in it"], rows)

    @staticmethod
    def _says(path: Path) -> str:
        return first_sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")

    def _packages(self) -> Iterator[tuple[str, str]]:
        for path in sorted((ROOT / "genssl").rglob("__init__.py")):
            room = path.parent.relative_to(ROOT / "genssl").as_posix()
            if room == "." or room.startswith("generation"):
                continue
            if any(other.suffix == ".py" and other.name != "__init__.py" for other in path.parent.iterdir()):
                yield f"`{room}/`", self._says(path)


class Benchmarks(Written):
    """What each file of tests/benchmarks measures."""

    def lines(self) -> Iterable[str]:
        """Returns a table."""
        rows = []
        for path in sorted((ROOT / "tests/benchmarks").glob("test_*.py")):
            said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").replace("\n\n", " ")
            rows.append((f"`{path.relative_to(ROOT).as_posix()}`", re.sub(r":? ?`pytest [^`]*`[;.]? ?", ". ", said)))
        return table(["file", "what it measures"], rows)


class Surface(Written):
    """The public surface, `genssl.__all__`."""

    def lines(self) -> Iterable[str]:
        """Returns a section a name, by its docstring."""
        for name in sorted(genssl.__all__, key=lambda name: (name.isupper(), name)):
            thing = getattr(genssl, name)
            if isinstance(thing, str):
                continue
            yield from [f"### `genssl.{name}`", ""]
            if name.isupper():
                kind = thing.kind
                yield from [
                    f"The registry of the {kind}, with {len(thing.names())} names; see [Registry](#registry).",
                    "",
                ]
                continue
            home = f"{thing.__module__}.{thing.__qualname__}"
            directive = "autofunction" if inspect.isfunction(thing) else "autoclass"
            options = [] if directive == "autofunction" or issubclass(thing, BaseModel) else ["   :members:"]
            if isinstance(thing, type) and issubclass(thing, BaseModel):
                yield from [f"`{home}`. {docstring(thing)}", ""]
                continue
            yield from ["```{eval-rst}", f".. {directive}:: {home}", *options, "```", ""]


def show_examples_as_code(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Makes the example of a docstring a block of code."""
    lines[:] = ["Example::" if line.strip() == "Example:" else line for line in lines]
    for place, line in enumerate(lines):
        if line == "Example::" and lines[place + 1 : place + 2] != [""]:
            lines.insert(place + 1, "")


def let_code_break(app: Sphinx, page: str, template: str, context: dict[str, Any], document: Any) -> None:
    """Lets long names and paths break where their parts end, so that tables fit a narrow screen."""

    def broken(found: re.Match[str]) -> str:
        return '<span class="pre">' + re.sub(r"([/_.=])(?=[^/_.=])", r"\1<wbr>", found[1]) + "</span>"

    if "body" in context:
        context["body"] = re.sub(r'<span class="pre">([^<]{9,})</span>', broken, context["body"])


# ---- Formulas ----


def write_math(translator: Any, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers draw without any script or network."""
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


# ---- Drawings ----


class InlineSvg(SphinxPostTransform):
    """Puts SVG drawings into the page itself, so that they take the page's colours, light or dark."""

    default_priority = 8

    def run(self, **_: Any) -> None:
        """Replaces the images."""
        if self.app.builder.format != "html":
            return
        for image in list(self.document.findall(nodes.image)):
            path = Path(self.app.srcdir) / image["uri"]
            if path.suffix == ".svg" and path.is_file():
                drawing = f'<div class="drawing">{path.read_text(encoding="utf-8")}</div>'
                image.replace_self(nodes.raw("", drawing, format="html"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the directives."""
    directives: dict[str, type[Written]] = {
        "genssl-registry": RegistryTable,
        "genssl-settings": ComponentSettings,
        "genssl-document": DocumentSettings,
        "genssl-component": Component,
        "genssl-recipes": RecipeList,
        "genssl-commands": Commands,
        "genssl-modules": Modules,
        "genssl-benchmarks": Benchmarks,
        "genssl-surface": Surface,
    }
    add: Callable[..., None] = app.add_directive
    for name, directive in directives.items():
        add(name, directive)
    app.connect("autodoc-process-docstring", show_examples_as_code, priority=400)  # before napoleon
    app.connect("html-page-context", let_code_break)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.add_post_transform(InlineSvg)
    return {"version": "1", "parallel_read_safe": True}
