"""What the pages in docs/ say of the project's own files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

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
