"""The examples of CONTRIBUTING.md, taken from the page and run together as plug-ins; its commands that count lines."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def block(language: str, marker: str) -> str:
    """Returns the one block of the page that has `marker` in it."""
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if marker in text]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder like site-packages, in which a distribution with the page's examples and entry points is installed."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("method", "generator", "evaluator", "dataset"):
        (folder / f"my_{name}.py").write_text(block("python", f"# my_{name}.py\n"))
    groups = block("toml", "entry-points")
    metadata = folder / "examples-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 1.0\n")
    text = re.sub(r'\[project\.entry-points\."([\w.]+)"\]', r"[\1]", groups).replace('"', "")
    (metadata / "entry_points.txt").write_text(text)
    return folder


def genssl(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genssl", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def arguments() -> list[str]:
    """Returns the arguments of the command that runs all examples."""
    return shlex.split(block("bash", "dataset=stripes").replace("\\\n", " "))[2:]


def test_a_recipe_takes_the_examples(site):
    valid = genssl(site, "validate", *arguments())
    assert (valid.returncode, valid.stderr) == (0, "")


@pytest.mark.slow
def test_the_examples_run_together(site, tmp_path):
    done = genssl(site, "run", *arguments(), "train.threads=1", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["metrics"]["norm/mean"] > 0
    assert results["ledger"]["variants_computed"] > 0
    assert results["provenance"]["dataset"]["name"] == "stripes"


def test_the_examples_are_short():
    for name in ("method", "generator", "evaluator", "dataset"):
        lines = block("python", f"# my_{name}.py\n").splitlines()
        assert sum(bool(line.strip()) for line in lines) <= 35


def test_the_commands_that_count_lines_print_three_lines():
    printed = subprocess.run(
        ["bash", "-c", block("bash", "wc -l")], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    said = block("text", "genssl/").splitlines()
    assert len(printed) == len(said) == 3
    assert [line.split()[1:] == [] for line in printed] == [line.split()[1:] == [] for line in said]
