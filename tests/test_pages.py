"""What the pages make of the code: tables that hold every setting, and a build without a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from browser import Browser, missing_browser

import genssl
from genssl.config.recipe import Recipe, VariantsConfig
from genssl.registry import REGISTRIES

pytest.importorskip("sphinx", reason="the extra docs is not installed")
pytest.importorskip("myst_parser", reason="the extra docs is not installed")
pytest.importorskip("furo", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """
import sys
sys.path.insert(0, "docs/_ext")
import genssl_pages as pages
from genssl.config.recipe import Recipe, VariantsConfig
print("\\n".join(pages.settings(VariantsConfig)))
print("\\n".join(pages.document_settings(Recipe, 3)))
"""


def test_tables_of_settings_hold_every_setting():
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True
    )
    rows = [line.strip(" |").split(" | ") for line in done.stdout.splitlines() if line.startswith("| `")]
    found = {name: rest for name, *rest in rows}
    assert found.keys() >= {f"`{name}`" for name in [*VariantsConfig.model_fields, *Recipe.model_fields]}
    assert found["`late`"][:2] == ["block, reuse, real", "`block`"]
    assert found["`max_reuse`"][:2] == ["whole number, ≥\u00a01", "`10`"]
    assert found["`method`"][:2] == ["one of the methods", "required"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pages")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.mark.slow
def test_pages_are_built_without_a_warning(built):
    for kind in ("methods", "generators"):
        for name, _, origin in REGISTRIES[kind].describe():
            if origin == "genssl":
                page = (built / kind / f"{name}.html").read_text()
                for field in REGISTRIES[kind].config(name).model_fields:
                    assert field == "name" or field in page.replace("<wbr>", "")


@pytest.mark.slow
def test_the_surface_is_documented_name_by_name(built):
    page = (built / "api.html").read_text()
    for name in set(genssl.__all__) - {"__version__"}:
        assert f"genssl.{name}" in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if (reason := missing_browser()) is not None:
        pytest.skip(reason)
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_the_screen_can_be_read_and_need_no_network(built, browser, width, dark):
    pages = sorted(path for path in built.rglob("*.html") if path.name not in ("search.html", "genindex.html"))
    assert len(pages) > 30
    for page in pages:
        seen = browser.look(page, width=width, height=900, dark=dark)
        assert seen.facts["dark"] == dark
        assert seen.facts["scroll_width"] <= width, page
        assert all(address.startswith(("file:", "data:")) for address in seen.requests), page
        faint = [text["text"] for text in seen.facts["texts"] if text["contrast"] < 3]
        assert not faint, page
