"""A YAML 1.2 file as plain data that remembers where every key stood, and `key.path=value` overrides upon it."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from genssl.base.wording import counted
from genssl.config.documents.shipped import shipped_or_own, shipped_recipes
from genssl.config.documents.yaml_nodes import MAX_CHARACTERS, MAX_DEPTH, LimitError, compose
from genssl.errors import LONGEST_NAME, ConfigError, suggest

KeyPath = tuple[str | int, ...]

TAGS = "tag:yaml.org,2002:"
SMALLEST, LARGEST = -(2**63), 2**64 - 1  # what others take: libraries, the wire, JSON readers
MAX_DIGITS = 66  # of LARGEST as binary, its prefix included; Python itself takes time for very long ones
IPV6_ADDRESS = re.compile(r"(?<![^\[\s,{:])\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]:\d+(?![^\s,}\]])")
WRITTEN_AS = "an override is written key.path=value, such as train.epochs=5"


@dataclass
class Document:
    """Plain data (dict, list, str, int, float, bool, None) and the place of each key path in it."""

    name: str
    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Returns "file:line" (or "override 'a.b=1'") of the deepest part of `path` that was written down."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.name


def dotted(path: KeyPath) -> str:
    """Returns a key path as people write it: ("evaluate", 0, "k") -> "evaluate.0.k"."""
    return ".".join(str(part) for part in path)


def read_document(path: str | Path) -> Document:
    """Reads a YAML file, or, where there is no such file, the recipe of that name that came with genssl.

    Raises:
        ConfigError: if the file is missing, not YAML, not a mapping, has a key twice, or goes over a limit of
            `genssl.config.documents.yaml_nodes`.
    """
    path = shipped_or_own(Path(path).expanduser())
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise ConfigError([_missing(path)]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: cannot be read as text: {_folder(path)}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read as text: {error.strerror or error}"]) from None
    except UnicodeDecodeError as error:
        said = f"byte {error.start} is none of UTF-8; a YAML file is expected here"
        raise ConfigError([f"{path}: cannot be read as text: {said}"]) from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """Parses YAML text; `name` stands for the file in messages. Raises ConfigError as `read_document` does."""
    try:
        node = compose(text)
    except LimitError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{name}:{line}: {error.problem}"]) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = ""
        if address := IPV6_ADDRESS.search((text.splitlines() or [""])[min(line, len(text.splitlines())) - 1]):
            hint = f"; an address that begins with a bracket is quoted in a file: '{address[0]}'"
        raise ConfigError([f"{name}:{line}: not valid YAML: {error.problem or error.context}{hint}"]) from None
    except YAMLError as error:
        raise ConfigError([f"{name}: not valid YAML: {_first_line(error)}"]) from None
    if node is None:
        raise ConfigError([f"{name}: is empty; a mapping of sections is expected"])
    if not isinstance(node, MappingNode):
        raise ConfigError([f"{name}:1: a mapping of sections is expected"])
    reader = _Reader(lambda node: f"{name}:{node.start_mark.line + 1}")
    reader.places[()] = f"{name}:1"
    return Document(name=name, data=reader.read(node, ()), places=reader.places)


def apply_override(document: Document, override: str) -> None:
    """Applies one `key.path=value` in place; the value is read as YAML, list items are numbered from 0.

    Mappings on the way are created if they are absent or null; lists do not grow. Addresses such as [::1]:50051, which
    no YAML begins with, need no quotes.

    Raises:
        ConfigError: if the override has no `=`, its value is not YAML, or its path leads through a value without keys.
    """
    path_text, equals, value_text = override.partition("=")
    where = f"override {override!r}"
    if not equals:
        raise ConfigError([f"{where}: {WRITTEN_AS}"])
    if not re.search("[\"']", value_text):
        value_text = IPV6_ADDRESS.sub(lambda found: f"'{found[0]}'", value_text)
    try:
        node = compose(value_text)
    except LimitError as error:
        raise ConfigError([f"{where[:60]}: {error.problem}"]) from None
    except YAMLError as error:
        raise ConfigError([f"{where}: the value is not valid YAML: {_first_line(error)}"]) from None

    def read(path: KeyPath) -> tuple[Any, dict[KeyPath, str]]:
        reader = _Reader(lambda _: where)
        return None if node is None else reader.read(node, path), reader.places

    _replace(document, path_text, where, read)


def apply_setting(document: Document, path_text: str, value: Any, where: str) -> None:
    """Sets the value at a dotted key path in place, as `apply_override` does, with a value that is read already.

    Args:
        document: changed.
        path_text: such as "train.epochs".
        value: plain data.
        where: stands for the place of the setting in messages.

    Raises:
        ConfigError: if the path is none, or leads through a value without keys.
    """
    _replace(document, path_text, where, lambda path: (copy.deepcopy(value), {}))


def _replace(
    document: Document, path_text: str, where: str, read: Callable[[KeyPath], tuple[Any, dict[KeyPath, str]]]
) -> None:
    parts = path_text.strip().split(".")
    if not all(parts):
        raise ConfigError([f"{where}: {WRITTEN_AS}"])
    if len(parts) > MAX_DEPTH:
        raise ConfigError([f"{where}: the key path has {len(parts)} parts; at most {MAX_DEPTH} are allowed"])
    parent: Any = document.data
    path: KeyPath = ()
    for part in parts[:-1]:
        key = _key(parent, part, path, where)
        path = (*path, key)
        if isinstance(parent, dict) and parent.get(key) is None:
            parent[key] = {}
            document.places[path] = where
        parent = parent[key]
    last = _key(parent, parts[-1], path, where)
    path = (*path, last)
    parent[last], places = read(path)
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places |= places | {path: where}


def _key(container: Any, part: str, path: KeyPath, where: str) -> str | int:
    """Returns the key or index that one part of an override's path means in the value at `path`."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise ConfigError([f"{where}: {dotted(path)} is {container!r}, which has no keys"])
    if not part.isdecimal() or int(part) >= len(container):
        count = counted(len(container), "item")
        raise ConfigError([f"{where}: {dotted(path)} is a list of {count}, numbered from 0; {part!r} is none of them"])
    return int(part)


def _first_line(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError):
        return str(error.problem or error.context)
    return str(error).partition("\n")[0]


def _missing(path: Path) -> str:
    if "=" in path.name:
        return f"{path}: is a setting, and no file of that name is there; the file comes first, settings follow it"
    shipped = {} if path.is_absolute() else shipped_recipes()
    short = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if short in shipped:
        return (
            f"{path}: no such file; genssl has a recipe of that name: give {short} in its place, or copy it with: "
            f"genssl recipes copy {short}"
        )
    near = difflib.get_close_matches(short[:LONGEST_NAME], shipped, n=1, cutoff=0.7)
    came = f"; genssl has a recipe {near[0]} (genssl recipes lists all)" if near else ""
    if not path.parent.is_dir():
        return f"{path}: no such file (the folder {path.parent} does not exist){came}"
    neighbours = [str(path.with_name(entry.name)) for entry in path.parent.glob("*.y*ml")]
    hint = suggest(str(path), neighbours) if neighbours else f" (no YAML file lies in {path.parent})"
    return f"{path}: no such file{hint}{came}"


def _folder(path: Path) -> str:
    if (path / "recipe.yaml").is_file():
        return f"it is the directory of a run, whose recipe is {path / 'recipe.yaml'}"
    return "it is a folder; give a YAML file"


class _Reader:
    """Turns YAML nodes into plain data and notes the place of every key and list item.

    Args:
        place: says where a node was written, for messages.
    """

    def __init__(self, place: Callable[[Node], str]) -> None:
        self.places: dict[KeyPath, str] = {}
        self._place = place
        self._open: list[Node] = []

    def read(self, node: Node, path: KeyPath) -> Any:
        """Returns the value of the node at `path`."""
        if any(node is ancestor for ancestor in self._open):
            self._refuse(node, path, "an alias stands inside what it repeats")
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self._open.append(node)
        value: Any = None
        if isinstance(node, SequenceNode) and node.tag == f"{TAGS}seq":
            value = self._list(node, path)
        elif isinstance(node, MappingNode) and node.tag == f"{TAGS}map":
            value = self._mapping(node, path)
        else:
            self._refuse_tag(node, path)
        self._open.pop()
        return value

    def _list(self, node: SequenceNode, path: KeyPath) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            self.places[*path, index] = self._place(child)
            items.append(self.read(child, (*path, index)))
        return items

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, ScalarNode):
                self._refuse(key_node, path, "keys must be plain words")
            if key_node.tag == f"{TAGS}merge":
                self._refuse(key_node, path, "merge keys (<<) are not allowed; write the settings out")
            key, line = str(key_node.value), key_node.start_mark.line + 1
            child_path = (*path, key)
            if key in mapping:
                first = f"duplicate key; first written on line {lines[key]}, remove one of them"
                self._refuse(key_node, child_path, first)
            self.places[child_path], lines[key] = self._place(key_node), line
            mapping[key] = self.read(child, child_path)
        return mapping

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        text = str(node.value)
        plain = text.replace("_", "").lower()
        try:
            match str(node.tag).removeprefix(TAGS):
                case "str" | "timestamp":
                    return text
                case "null" if plain in ("", "~", "null"):
                    return None
                case "bool" if plain in ("true", "false"):
                    return plain == "true"
                case "int":
                    return self._integer(node, plain, path)
                case "float":
                    return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
                case "null" | "bool" as kind:
                    raise ValueError(kind)
                case _:
                    self._refuse_tag(node, path)
        except ValueError:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            self._refuse(node, path, f"{shown!r} cannot be read as the YAML type {str(node.tag).removeprefix(TAGS)}")

    def _integer(self, node: Node, plain: str, path: KeyPath) -> int:
        digits = plain.lstrip("+-")
        number = int(plain, 0 if digits[:2] in ("0x", "0o", "0b") else 10) if len(digits) <= MAX_DIGITS else LARGEST + 1
        if SMALLEST <= number <= LARGEST:
            return number
        shown = plain if len(plain) <= 40 else f"{plain[:20]}... of {len(plain)} characters"
        said = "is too large; those from -2**63 to 2**64 - 1 are read (quote what is text)"
        return self._refuse(node, path, f"the integer {shown} {said}")

    def _refuse_tag(self, node: Node, path: KeyPath) -> NoReturn:
        self._refuse(node, path, f"the tag {node.tag!r} is not allowed; only plain values are")

    def _refuse(self, node: Node, path: KeyPath, problem: str) -> NoReturn:
        raise ConfigError([f"{self._place(node)}: {dotted(path) or 'document'}: {problem}"])
