"""`genssl recipes`: what it lists and copies, in a source tree and in an installed package."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from genssl.cli.main import app
from genssl.config.documents import shipped
from genssl.config.load import load_study
from genssl.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["recipes", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_every_recipe_is_listed_with_a_line_of_its_header():
    lines = call().splitlines()
    listed = {line.split()[0]: line for line in lines if line and not line.startswith("Copy")}
    files = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/**/*.yaml")}
    assert set(listed) == files
    assert "SimCLR on ImageNet-1k, ResNet-50, 100 epochs" in listed["imagenet/simclr"]
    assert "AdaInf (Wang et al. 2024, arXiv 2403.12448) on the digits" in listed["adainf"], "al. ends no sentence"
    assert all(len(line.split()) > 4 for line in listed.values())
    assert lines[-1] == "Copy one with: genssl recipes copy NAME [DEST]"


def test_a_copy_is_the_file_itself(tmp_path):
    target = tmp_path / "mine.yaml"
    assert call("copy", "imagenet/byol", str(target)) == f"{target}: written\n"
    assert target.read_bytes() == (ROOT / "recipes" / "imagenet" / "byol.yaml").read_bytes()
    call("copy", "cifar10/simclr.yaml", str(tmp_path))
    assert (tmp_path / "simclr.yaml").read_bytes() == (ROOT / "recipes" / "cifar10" / "simclr.yaml").read_bytes()


@pytest.mark.parametrize("name", ["studies/methods", "online_vs_offline"])
def test_a_study_comes_with_the_recipe_that_it_is_built_on(name, tmp_path):
    call("copy", name, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {f"{Path(name).name}.yaml", "simclr_sd.yaml"}
    copied = load_study(tmp_path / f"{Path(name).name}.yaml")
    original = load_study(ROOT / "recipes" / f"{name}.yaml")
    assert (copied.base, copied.arms, copied.seeds) == (original.base, original.arms, original.seeds)


def test_copies_replace_nothing(tmp_path):
    (tmp_path / "simclr.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"simclr.yaml: exists already; give another destination, or remove it"):
        call("copy", "imagenet/simclr", str(tmp_path))
    assert (tmp_path / "simclr.yaml").read_text() == "mine"
    (tmp_path / "simclr_sd.yaml").write_text("mine too")
    with pytest.raises(UserError, match=r"simclr_sd.yaml: exists already"):
        call("copy", "studies/methods", str(tmp_path))
    assert not (tmp_path / "methods.yaml").exists(), "half a study is no study"


@pytest.mark.parametrize(
    ("name", "destination", "message"),
    [
        ("imagenet/simcl", ".", r"there is no 'imagenet/simcl'; did you mean 'imagenet/simclr'\?"),
        ("imagenet/simclr", "no/folder/x.yaml", r"the folder .*no/folder does not exist; make it first"),
        ("imagenet/simclr", "x.txt", r"x.txt: is not a folder, and a recipe's name ends in .yaml"),
    ],
)
def test_mistakes(name, destination, message, tmp_path):
    with pytest.raises(UserError, match=message):
        call("copy", name, str(tmp_path / destination))
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_has_the_recipes_where_the_installed_package_looks(tmp_path, monkeypatch):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {
        "recipes": f"genssl/{shipped.IN_PACKAGE}",
        "servers": f"genssl/{shipped.SERVERS_IN_PACKAGE}",
    }
    package = tmp_path / "site-packages" / "genssl"
    (package / shipped.IN_PACKAGE / "imagenet").mkdir(parents=True)
    (package / shipped.IN_PACKAGE / "imagenet" / "mine.yaml").write_text("# Mine. And more.\nname: x\n")
    monkeypatch.setattr(shipped.genssl, "__file__", str(package / "__init__.py"))
    assert list(shipped.shipped_recipes()) == ["imagenet/mine"]
    assert call().splitlines()[0] == "imagenet/mine  Mine."
    (package / shipped.IN_PACKAGE).rename(package / "elsewhere")
    with pytest.raises(
        UserError, match=r"this installation has none \(looked for .*recipes_data\); install genssl again"
    ):
        call()


def test_listing_imports_nothing_heavy():
    code = "import sys; sys.argv = ['genssl', 'recipes']; from genssl.cli.main import app; app(standalone_mode=False)"
    code += "; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
