"""The public surface: `genssl.__all__`, imported name by name when it is asked for, and no heavier than it must be."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import genssl

CLIENT_HEAVY = ("torch", "torchvision", "diffusers", "transformers", "sklearn")
HEAVY = (*CLIENT_HEAVY, "grpc", "numpy", "lmdb")


def imported_by(code: str) -> set[str]:
    """Returns which of the heavy modules a program has imported at its end."""
    program = f"{code}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(eval(done.stdout))


@pytest.mark.parametrize("name", genssl.__all__)
def test_every_name_is_there(name):
    thing = getattr(genssl, name)
    assert name in dir(genssl)
    assert isinstance(thing, str) or thing.__doc__


def test_the_names_are_in_order_and_each_once():
    assert len(set(genssl.__all__)) == len(genssl.__all__)
    assert set(genssl.__all__) == {*genssl._PLACES, "__version__"}


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'genssl' has no attribute 'nothing'"):
        genssl.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["VariantClient", "AsyncVariantClient"])
def test_a_client_needs_no_torch(name):
    assert not imported_by(f"from genssl import {name}") & set(CLIENT_HEAVY)


@pytest.mark.parametrize(
    "names", ["METHODS, BACKBONES, GENERATORS, EVALUATORS", "DATASETS, ComponentConfig, UserError"]
)
def test_registries_and_what_plug_ins_derive_from_are_light(names):
    assert imported_by(f"from genssl import {names}") == set()


def test_a_recipe_is_read_without_anything_heavy():
    code = "import genssl; genssl.load(genssl.Recipe, 'simclr_sd', ['seed=1'])"
    assert imported_by(code) == set()


@pytest.mark.slow
def test_the_program_of_the_page_runs(tmp_path):
    page = (Path(__file__).resolve().parent.parent / "docs/api.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'knn/top1'" in done.stdout
