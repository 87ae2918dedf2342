"""The paper's numbers beside ours: cells of paper_tables.yaml, and differences computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from genssl.config.documents.document import parse_document
from genssl.config.study import Arm
from genssl.errors import ConfigError, suggest
from genssl.studies.model import PaperCell

PAPER = "arXiv 2403.05966"


@cache
def paper_tables() -> dict[str, Any]:
    """Returns every table: name -> {source, what, rows: row -> column -> value}.

    Values are accuracies in per cent, and distances in the table `similarity`.
    """
    return parse_document((files("genssl.studies") / "paper_tables.yaml").read_text(), "paper_tables.yaml").data


def look_up(cell: str) -> float:
    """Returns the value of a cell TABLE.ROW.COLUMN, in per cent where it is an accuracy.

    Raises:
        ConfigError: if there is none.
    """
    found: Any = {name: table["rows"] for name, table in paper_tables().items()}
    for part in cell.split("."):
        if not isinstance(found, dict) or part not in found:
            allowed = found if isinstance(found, dict) else {}
            raise ConfigError([f"paper: {cell!r}: there is no {part!r} in the paper's tables{suggest(part, allowed)}"])
        found = found[part]
    if not isinstance(found, int | float):
        raise ConfigError([f"paper: {cell!r} is not a cell; one is written TABLE.ROW.COLUMN{suggest('', found)}"])
    return float(found)


def paper_cell(arm: Arm, against: Mapping[str, Arm]) -> PaperCell | None:
    """Returns what the paper has for an arm, with its differences from those arms that have a cell too."""
    if arm.paper is None:
        return None
    value = look_up(arm.paper)
    differences = {
        name: round(value - look_up(other.paper), 2) for name, other in against.items() if other.paper is not None
    }
    return PaperCell(value=value, differences=differences, source=_source(arm.paper))


def paper_says(cells: Sequence[str]) -> str | None:
    """Returns what the cells of a study are, in words, or None if there are none."""
    tables = list(dict.fromkeys(cell.split(".")[0] for cell in cells))
    if not tables:
        return None
    return "; ".join(f"{paper_tables()[name]['what']} ({_source(name)})" for name in tables)


def _source(cell: str) -> str:
    return f"{PAPER}, {paper_tables()[cell.split('.')[0]]['source']}"
