"""The main job, as the README runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readme_command_reaches_its_accuracy_with_variants_from_the_server(tmp_path):
    command = [sys.executable, "-m", "genssl", "run", "recipes/simclr_sd.yaml", "--out", str(tmp_path / "run")]
    started = time.monotonic()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(f"{time.monotonic() - started:.0f} s\n{finished.stdout[-1500:]}")
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["knn/top1"] >= 0.96
    assert results["ledger"]["variants_generated"] == results["ledger"]["distinct_variants"] > 10_000
    assert results["ledger"]["fresh_fraction"] == 1.0
    assert results["ledger"]["bytes_received"] > 0
