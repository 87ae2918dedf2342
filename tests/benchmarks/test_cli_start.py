"""How long the command line takes to start: `pytest tests/benchmarks/test_cli_start.py --benchmark-only`.

The aim is 0.5 s for help and 1 s for validating a recipe.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "recipes/simclr_sd.yaml"]], ids=lambda words: words[0])
def test_start(benchmark, arguments):
    def start() -> int:
        command = [sys.executable, "-m", "genssl", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode

    assert benchmark.pedantic(start, rounds=10, warmup_rounds=1) == 0
