"""The programs in the README run as they stand there, with a server and pictures in a folder `photos`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from server_fixtures import running_server

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "127.0.0.1:50051"


def program(marker: str) -> str:
    """Returns the one Python block of the README that has `marker` in it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/own-training-loop.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if marker in block]
    return block


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(
    "marker",
    [
        "cross_entropy",
        pytest.param(
            "lightly",
            marks=pytest.mark.skipif(importlib.util.find_spec("lightly") is None, reason="lightly is not installed"),
        ),
    ],
)
def test_a_program_of_the_readme_trains(server, marker, tmp_path, digits_train):
    for row in range(160):
        folder = tmp_path / "photos" / str(digits_train.label(row))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits_train.image(row).transpose(1, 2, 0)).save(folder / f"{row}.png")
    text = program(marker)
    assert text.count(ADDRESS) == 1
    assert "range(100)" in text
    script = tmp_path / "train.py"
    script.write_text(text.replace(ADDRESS, server.address).replace("range(100)", "range(2)"))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\d+\.\d+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 2
