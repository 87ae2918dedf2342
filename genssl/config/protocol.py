"""What `genssl evaluate` is told: a protocol file, or blocks on the command line."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SerializeAsAny

from genssl.config.base import ComponentConfig, Kind, Section


class Protocol(Section):
    """How encoders are judged: every evaluator on every data set, such as those of a paper's table."""

    name: str = Field(pattern=r"^[\w.-]+$")
    datasets: Annotated[list[SerializeAsAny[ComponentConfig]], Kind("datasets")] = Field(min_length=1)
    evaluate: Annotated[list[SerializeAsAny[ComponentConfig]], Kind("evaluators")] = Field(min_length=1)
