"""What only reads recipes starts fast, because it imports none of the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "diffusers", "transformers", "grpc", "sklearn", "matplotlib", "scipy", "numpy", "PIL")

# The exit code and the heavy modules go to a file, since the command owns standard output and standard error.
MAIN = """
import json, sys
report, heavy, sys.argv = sys.argv[1], sys.argv[2].split(","), ["genssl", *sys.argv[3:]]
from genssl.cli.main import main
code = 0
try:
    main()
except SystemExit as exit:
    code = exit.code or 0
json.dump({"code": code, "heavy": [name for name in heavy if name in sys.modules]}, open(report, "w"))
"""


def imported_by(report: Path, *arguments: str, watched: tuple[str, ...] = HEAVY) -> dict[str, object]:
    command = [sys.executable, "-c", MAIN, str(report), ",".join(watched), *arguments]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=True)
    result: dict[str, object] = json.loads(report.read_text())
    return result


def test_importing_the_package_imports_nothing_heavy():
    code = f"import genssl, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["list"],
        ["show", "recipes/simclr_sd.yaml"],
        ["validate", "recipes/simclr_sd.yaml", "recipes/generators/digits_unclip.yaml"],
    ],
    ids=" ".join,
)
def test_reading_commands_import_nothing_heavy(tmp_path, arguments):
    assert imported_by(tmp_path / "report.json", *arguments) == {"code": 0, "heavy": []}


def test_mistakes_are_found_before_anything_heavy_is_imported(tmp_path):
    arguments = ["run", "recipes/simclr_sd.yaml", "train.epoch=5"]
    assert imported_by(tmp_path / "report.json", *arguments) == {"code": 2, "heavy": []}


def test_the_check_itself_sees_modules(tmp_path):
    arguments = ["validate", "recipes/simclr_sd.yaml"]
    report = imported_by(tmp_path / "report.json", *arguments, watched=("pydantic", "torch", "ruamel.yaml"))
    assert report == {"code": 0, "heavy": ["pydantic", "ruamel.yaml"]}
