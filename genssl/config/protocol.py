"""What `genssl evaluate` is told: a protocol file, or blocks on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, SerializeAsAny

from genssl.config.base import ComponentConfig, Kind, Section
from genssl.config.document import parse_document
from genssl.config.load import validate


class Protocol(Section):
    """How encoders are judged: every evaluator on every data set, such as those of a paper's table."""

    name: str = Field(pattern=r"^[\w.-]+$")
    datasets: Annotated[list[SerializeAsAny[ComponentConfig]], Kind("datasets")] = Field(min_length=1)
    evaluate: Annotated[list[SerializeAsAny[ComponentConfig]], Kind("evaluators")] = Field(min_length=1)


class _Dataset(Section):
    dataset: Annotated[SerializeAsAny[ComponentConfig], Kind("datasets")]


class _Evaluator(Section):
    evaluator: Annotated[SerializeAsAny[ComponentConfig], Kind("evaluators")]


class _Backbone(Section):
    backbone: Annotated[SerializeAsAny[ComponentConfig], Kind("backbones")]


BLOCKS: dict[str, type[Section]] = {"dataset": _Dataset, "evaluator": _Evaluator, "backbone": _Backbone}


def parse_blocks(what: str, texts: Sequence[str]) -> list[ComponentConfig]:
    """Reads blocks from the command line: a name, or `{name: knn, k: 5}`.

    Args:
        what: dataset, evaluator or backbone, the option that they were given by.
        texts: YAML, one block each.

    Returns:
        Their configs; `model_fields_set` says which settings were written down.

    Raises:
        ConfigError: naming the option, for text that is not YAML, unknown names and wrong settings.
    """
    configs = []
    for text in texts:
        document = parse_document(f"{what}: {text}", f"--{what}")
        document.places = dict.fromkeys(document.places, f"--{what} {text!r}")  # a line number would say nothing
        configs.append(getattr(validate(BLOCKS[what], document), what))
    return configs
