"""What is built is what is meant: the wheel, installed where there is no repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import genssl

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command with nothing of this process's Python; returns what it prints."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_the_version_and_all_files(wheel):
    assert wheel.name == f"genssl-{genssl.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    beside = {"py.typed", "studies/paper_tables.yaml", "studies/templates/report.css"}
    assert {f"genssl/{name}" for name in beside} <= names
    for folder, inside in (("recipes", "recipes_data"), ("servers", "servers_data"), ("genssl", "")):
        wanted = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
        for path in wanted:
            if "__pycache__" not in path.parts:
                assert (Path("genssl") / inside / path).as_posix() in names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)


def test_the_installed_wheel_works_in_an_empty_folder(wheel, tmp_path):
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    # Its libraries are those of this environment, but genssl is the wheel's: a .pth file comes after what is installed.
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "zz_libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=empty)
    where = run(python, "-c", "import genssl; print(genssl.__file__)", cwd=empty)
    assert Path(where.strip()).is_relative_to(environment)
    command = environment / "bin" / "genssl"
    assert run(command, "--version", cwd=empty) == f"genssl {genssl.__version__}\n"
    assert "simclr" in run(command, "list", "methods", cwd=empty)
    assert "imagenet/simclr" in run(command, "recipes", cwd=empty)
    assert "valid" in run(command, "validate", "simclr_sd", "studies/methods", "servers/digits_unclip.yaml", cwd=empty)
    assert not any(empty.iterdir())
