"""Writes a validated document back as YAML."""

from __future__ import annotations

import io

from pydantic import BaseModel
from ruamel.yaml import YAML


def to_yaml(document: BaseModel) -> str:
    """Returns every setting, defaults included, in the order of the sections; validating it gives the same document."""
    yaml = YAML(typ="rt", pure=True)
    yaml.default_flow_style = False
    buffer = io.StringIO()
    yaml.dump(document.model_dump(mode="json"), buffer)
    return buffer.getvalue()
