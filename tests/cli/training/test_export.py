"""`genssl export` as a user meets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.cli.main import app
from genssl.errors import UserError
from genssl.generators.conditioner import save_encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = ResNet18Config()
    (tmp_path / "run").mkdir()
    save_encoder(tmp_path / "run" / "encoder.safetensors", build_resnet(config), config, image_size="32")
    return tmp_path / "run"


def test_a_run_for_torchvision_with_the_lines_that_load_it(folder, tmp_path):
    out = tmp_path / "resnet18.pth"
    result = CliRunner().invoke(app, ["export", f"{folder}/", "--to", "torchvision", "--out", str(out)])
    assert result.exit_code == 0, result.exception
    assert result.stdout.startswith(f"{out}: written; features read back differ by 0.0e+00 of the largest\n")
    names: dict[str, Any] = {}
    exec(result.stdout.partition("\n\n")[2], names)
    assert names["features"].shape == (2, 512)


def test_mistakes(folder, tmp_path):
    result = CliRunner().invoke(app, ["export", str(folder), "--to", "pickle", "--out", "x"])
    assert result.exit_code == 2
    assert "'pickle' is not one of" in result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--to", "torchvision", "--out", "x.pth"])
    assert isinstance(result.exception, UserError)
    assert "holds no encoder.safetensors" in str(result.exception)
