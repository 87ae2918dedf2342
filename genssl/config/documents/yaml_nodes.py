"""YAML text as nodes, within limits: a file of a few hundred bytes can stand for gigabytes of values.

What aliases repeat is counted before anything is repeated, and nesting before anything recurses into it.
"""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import Node

# Far above what people write: the longest shipped recipe has 5 kB, the largest 409 keys and values, and 7 levels.
MAX_CHARACTERS = 2**20
MAX_VALUES = 20_000  # with everything that aliases repeat
MAX_DEPTH = 50


class LimitError(MarkedYAMLError):
    """Text that is YAML, and more of it than is read; `problem` and `problem_mark` say what and where."""


def compose(text: str) -> Node | None:
    """Parses YAML 1.2 text; returns None if it holds nothing.

    Raises:
        LimitError: if it is longer, deeper or holds more values than the limits of this module.
        YAMLError: if it is not YAML.
    """
    if len(text) > MAX_CHARACTERS:
        raise LimitError(problem=f"the text has more than {MAX_CHARACTERS} characters")
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Composer
    node: Node | None = yaml.compose(text)
    return node


class _Composer(Composer):
    """Composes nodes and knows of each how many values it holds and how deep they are, aliases written out."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self._open = 0  # collections around the node that is composed
        self._written = 0  # nodes so far, each alias being one
        self._sizes: dict[int, tuple[int, int]] = {}  # by the identity of nodes: values and levels

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Composes the next node; raises LimitError as soon as one goes over a limit."""
        mark = self.parser.peek_event().start_mark
        self._written += 1
        self._check(self._open + 1, self._written, mark)
        self._open += 1
        node = super().compose_node(parent, index)
        self._open -= 1
        if node.end_mark is None:
            return node  # an alias inside what it repeats, which is refused when the nodes are read
        if id(node) not in self._sizes:
            self._sizes[id(node)] = self._size(node)
        values, levels = self._sizes[id(node)]
        self._check(self._open + levels, values, mark)
        return node

    def _size(self, node: Node) -> tuple[int, int]:
        if not isinstance(node.value, list):
            return 1, 1
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        sizes = [self._sizes.get(id(part), (1, 1)) for part in parts]
        return 1 + sum(values for values, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)

    def _check(self, levels: int, values: int, mark: Any) -> None:
        if levels > MAX_DEPTH:
            raise LimitError(problem=f"the text is nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        if values > MAX_VALUES:
            raise LimitError(
                problem=f"the text holds more than {MAX_VALUES} keys and values, what aliases repeat included",
                problem_mark=mark,
            )
