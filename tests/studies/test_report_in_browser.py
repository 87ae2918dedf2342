"""The reports of a study and of a run as a browser shows them: on a phone and on a desk, in light and in dark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.training.report import write_report as write_run_report

ROOT = Path(__file__).resolve().parents[2]
SCREENS = [(375, 812), (1280, 900)]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with its report, and a name that is longer than a phone is wide."""
    out = tmp_path_factory.mktemp("run")
    name = "a-run-with-one-very-long-name-that-has-no-place-to-break-" * 2 + "x"
    recipe = load(Recipe, ROOT / "recipes" / "simclr_sd.yaml", [f"name={name}"])
    ledger = {
        **{"variants_generated": 900, "variants_from_store": 0, "variants_reused": 80, "fallbacks_to_real": 20},
        **{"distinct_variants": 900, "fresh_fraction": 0.9, "stall_seconds": 2.5, "trainer_seconds": 30.0},
        **{"generator_seconds": 11.5, "bytes_received": 172800, "retries_away": 2},
    }
    protocol = {"knn": {"similarity": "cosine", "k": 20, "tested_on": "validation (0.25 of train)", "tested": 359}}
    provenance = {
        "packages": {"torch": "2.15.0"},
        "dataset": {"name": "digits", "digest": "61e6135d2dfcaf395f55d6f295894aed" * 4},
        "variants": {"source": "online", "model": "builtin:digits-unclip", "note": "made at a <small> size"},
    }
    results = {
        "name": name,
        "metrics": {"knn/top1": 0.9512, "linear_probe/top1@10": 0.8123, "linear_probe/top1@10_std": 0.01},
        **{"ledger": ledger, "protocol": protocol, "provenance": provenance, "seconds": 41.5},
    }
    epochs = [{"epoch": epoch, "loss": 4 / epoch} for epoch in range(1, 9)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    Image.linear_gradient("L").resize((1140, 978)).save(out / "samples.png")
    write_run_report(out, recipe, results)
    return out


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SCREENS, ids=["phone", "desktop"])
@pytest.mark.parametrize("which", ["study", "run"])
def test_a_browser_shows_the_report_well(
    browser, written: Path, run_directory: Path, which: str, width: int, height: int, dark: bool
):
    report = (written if which == "study" else run_directory) / "report.html"
    look = browser.look(report, width=width, height=height, dark=dark)
    facts = look.facts
    assert facts["dark"] == dark
    assert facts["scroll_width"] <= width, "the page scrolls sideways"
    assert facts["body_font"] >= 16
    assert facts["images"]
    for image in facts["images"]:
        assert image["natural"] > 0
        assert image["alt"]
    assert len(facts["texts"]) > 50
    assert [text for text in facts["texts"] if text["contrast"] < 4.5] == []
    assert min(text["size"] for text in facts["texts"]) >= 13
    assert look.console == []
    assert [address for address in look.requests if not address.startswith("data:")] == [report.as_uri()]
    assert min(facts["targets"], default=44) >= 40, "too small to tap"


def test_figures_follow_the_colours_of_the_page(browser, written: Path):
    looks = [browser.look(written / "report.html", width=1280, height=900, dark=dark) for dark in (False, True)]
    light, dark = ([image["source"] for image in look.facts["images"]] for look in looks)
    assert [one == other for one, other in zip(light, dark, strict=True)] == [False] * 6 + [True] * (len(light) - 6)
