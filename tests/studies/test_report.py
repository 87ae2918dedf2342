"""The report of a study: its numbers are the summary's, and it needs nothing but itself."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.transforms import Bbox
from PIL import Image

from genssl.studies.figures import drawings
from genssl.studies.model import Estimate, RunCost, Summary
from genssl.studies.report import write_report
from genssl.studies.scatter import place_labels
from genssl.studies.table import MINUS, bytes_text, difference_text, interval_text, seconds_text, verdict_of
from genssl.training.report import DARK, LIGHT, png_of

TOP1 = "linear_probe/top1"


class Page(HTMLParser):
    """What a page says: tables as rows of texts, by caption; all text; all tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._caption: str | None = None
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "caption":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag in ("small", "span") and self._rows and self._rows[-1]:
            self._rows[-1][-1] += " "
        self._in.append(tag)

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass
        if tag == "table":
            rows = [[" ".join(cell.split()) for cell in row] for row in self._rows]
            self.tables[" ".join((self._caption or "").split())] = rows
            self._rows = []

    def handle_data(self, data):
        if "style" in self._in:
            return
        self.text += data
        if "caption" in self._in:
            self._caption = (self._caption or "") + data
        elif "table" in self._in and self._rows and self._rows[-1]:
            self._rows[-1][-1] += data

    def table(self, words: str) -> list[list[str]]:
        return next(rows for caption, rows in self.tables.items() if words in caption)

    def row(self, words: str, arm: str) -> list[str]:
        return next(row for row in self.table(words) if arm in row[0])


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text())


def shown(estimate: Estimate, *, sign: bool = False) -> str:
    """An accuracy, or a difference of accuracies, as the page must show it; worked out another way than there."""
    mean = f"{100 * estimate.mean:+.2f}" if sign else f"{100 * estimate.mean:.2f}"
    if sign and float(mean) == 0:
        mean = "0.00"
    if estimate.low is None:
        return f"{mean} no interval (one seed)".replace("-", MINUS)
    half = 100 * (estimate.high - estimate.low) / 2
    return f"{mean} ± {half:.2f}, n = {estimate.n}".replace("-", MINUS)


# ---- What the page says ----
def test_the_main_table_holds_the_numbers_of_the_summary(study: Summary, page: Page):
    rows = page.table("Every run of these arms took 440 optimiser steps (40 epochs)")
    assert rows[0][0] == "arm"
    assert rows[0][2:4] == ["minus no variants points", "minus stored, K = 10 points"]
    arms = [arm for arm in study.arms if arm.equal == "steps"]
    assert len(rows) == len(arms) + 1
    for arm, row in zip(arms, rows[1:], strict=True):
        assert row[0] == f"{study.arms.index(arm) + 1} {arm.label}"
        assert row[1] == shown(arm.metrics[TOP1])
        for name, cell in zip(("none", "stored_10"), row[2:4], strict=True):
            found = arm.differences.get(name, {}).get(TOP1)
            assert (shown(found, sign=True) in cell) if found else ("not compared" in cell), (arm.name, name)
        assert row[4:6] == [f"{arm.cost.generator_calls:,.0f}", f"{arm.cost.distinct_variants:,.0f}"]
        assert row[6] == f"{arm.cost.wall_clock_seconds:.0f} s"
        assert row[7:] == [shown(arm.metrics[metric]) for metric in study.metrics[1:]]


def test_marks_say_in_words_what_an_interval_says(page: Page):
    fresh = page.row("Every run of these arms", "online, fresh")
    assert fresh[2].startswith("▲ +")
    assert "interval above 0" in fresh[2]
    assert page.row("Every run of these arms", "A/A")[3].startswith("= 0.00")


def test_a_single_seed_has_no_interval(page: Page):
    row = page.row("Every run of these arms", "one seed")
    assert [cell.endswith("no interval (one seed)") for cell in row[1:4]] == [True] * 3
    assert page.row("of every run", "one seed")[2:] == ["not run", "not run"]


def test_equal_generator_calls_and_equal_wall_clock_have_their_own_tables(study: Summary, page: Page):
    calls = page.table("About 14,225 generator calls")
    assert [row[0] for row in calls[1:]] == ["4 stored, K = 10", "6 online, budget < 25 % & reuse"]
    rows = page.table("In the wall-clock of online, fresh")
    assert [row[0] for row in rows[1:]] == ["5 online, fresh", "8 no variants, in the wall-clock of online"]
    assert shown(study.arm("long").differences["fresh"][TOP1], sign=True) in rows[2][2]
    assert [row[4:6] for row in rows[1:]] == [["40", "440"], ["77", "847"]]


def test_the_papers_numbers_stand_beside_ours_and_are_not_taken_for_ours(study: Summary, page: Page):
    row = page.row("Accuracy in per cent, differences in points", "stored, K = 10")
    assert row[1:5] == ["68.11", shown(study.arm("stored_10").metrics[TOP1]), "no variants", "+6.27"]
    assert "Not the same measurement." in page.text
    assert "ImageNet" in page.text
    assert "Ours are from digits (1,437 training images)" in page.text


def test_controls_pass_or_fail_in_words(page: Page):
    text = " ".join(page.text.split())
    assert "✓ Passed. online, indices mod 10 over the stored variants (A/A) against stored, K = 10" in text
    assert "✗ FAILED. <b>one seed</b> & $x_1$ against stored, K = 1" in text
    assert "A control failed." in text
    assert text.index("A control failed.") < text.index("At equal optimiser steps")
    assert "0.0028 (must be 0)" in text


def test_the_verdict_comes_first(study: Summary, page: Page):
    text = " ".join(page.text.split())
    places = [text.index(sentence) for sentence in (*study.verdict, *study.cautions, "At equal optimiser steps")]
    assert places == sorted(places)


def test_every_seed_the_ledger_and_the_provenance_are_there(study: Summary, page: Page):
    arm = study.arm("fresh")
    values = [f"{100 * run.metrics[TOP1]:.2f}" for run in arm.runs]
    assert page.row(f"{TOP1} of every run", "online, fresh")[1:] == values
    waited = page.row("ledger counted", "seconds the training waited for variants")
    assert waited[5] == "21.900"
    assert page.row("ledger counted", "a count of tomorrow")[1] == "0.500"
    fresh = page.row("ledger counted", "planned variants that arrived as planned")
    assert (fresh[5], fresh[6]) == ("100.0 %", "25.0 %")
    assert "builtin:digits-unclip" in page.text
    assert "torch: 2.15.0" in page.text


def test_what_the_study_says_is_text_and_not_markup(written: Path, page: Page):
    html = (written / "report.html").read_text()
    assert "<b>one seed</b> & $x_1$" in page.text
    assert "&lt;b&gt;one seed&lt;/b&gt; &amp; $x_1$" in html
    for raw in ("<b>one seed", "<i>markup", "<script", "<small></h1>", "Table <3>"):
        assert raw not in html


def test_the_page_is_one_file(page: Page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe") or attributes.get("href") == "data:,"
        for name in ("src", "srcset", "href", "data", "poster"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), (tag, address)


def test_figures_and_samples_are_embedded_with_what_they_show_in_words(study: Summary, page: Page, written: Path):
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    sources = [attributes for tag, attributes in page.tags if tag == "source"]
    figures = sorted(path.name for path in (written / "figures").iterdir())
    assert figures == sorted(f"{drawing.name}.png" for drawing in drawings(study))
    assert len(figures) == len(sources) == 6
    # Arms with variants, without the one whose picture is missing.
    assert len(images) == 6 + sum(arm.cost.views_from_variants > 0 for arm in study.arms) - 1
    assert all(attributes["alt"] for attributes in images)
    assert "stored, K = 1: 94." in images[0]["alt"]
    assert all("dark" in attributes["media"] for attributes in sources)
    for path in (written / "figures").iterdir():
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.std() > 10, path


def test_headings_captions_and_language_help_those_who_listen(page: Page):
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption")
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(below <= above + 2 for above, below in pairwise(levels))


# ---- CSV ----
def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_summary_csv_gives_the_summary_back(study: Summary, written: Path):
    rows = {(row["arm"], row["metric"]): row for row in rows_of(written / "summary.csv")}
    assert len(rows) == len(study.arms) * len(study.metrics)

    def read(row: dict[str, str], prefix: str, mean: str) -> Estimate | None:
        if not row[mean]:
            return None
        low, high = (float(row[f"{prefix}{end}"]) if row[f"{prefix}{end}"] else None for end in ("low", "high"))
        return Estimate(mean=float(row[mean]), low=low, high=high, n=int(row[f"{prefix}n"]))

    for arm in study.arms:
        for metric, estimate in arm.metrics.items():
            row = rows[arm.name, metric]
            assert row["label"] == arm.label
            assert read(row, "", "mean") == estimate
            for other in ("none", "stored_10", "fresh"):
                expected = arm.differences.get(other, {}).get(metric)
                assert read(row, f"minus_{other}_", f"minus_{other}") == expected
            assert RunCost(**{name: float(row[name]) for name in RunCost.model_fields}) == arm.cost


def test_runs_csv_gives_every_run_back(study: Summary, written: Path):
    rows = {(row["arm"], int(row["seed"])): row for row in rows_of(written / "runs.csv")}
    assert len(rows) == sum(len(arm.runs) for arm in study.arms)
    for arm in study.arms:
        for run in arm.runs:
            row = rows[arm.name, run.seed]
            assert {name: float(row[name]) for name in run.metrics} == run.metrics
            assert {name: float(row[f"ledger_{name}"]) for name in run.ledger} == run.ledger
            assert (int(row["steps"]), float(row["wall_clock_seconds"])) == (run.steps, run.cost.wall_clock_seconds)


# ---- Numbers and figures ----
def test_numbers_in_words():
    assert [seconds_text(seconds) for seconds in (0, 4.26, 41.2, 700, 9000)] == [
        "0 s",
        "4.3 s",
        "41 s",
        "11.7 min",
        "2.5 h",
    ]
    assert [bytes_text(size) for size in (0, 374_000, 3_736_200, 2e14)] == ["0 B", "374 kB", "3.7 MB", "200 TB"]
    assert [difference_text("knn/top1", value) for value in (0.0125, -0.0125, -1e-9)] == [
        "+1.25",
        f"{MINUS}1.25",
        "0.00",
    ]
    assert difference_text("rankme", 0.51236) == "+0.5124"
    lopsided = Estimate(mean=0.99, low=0.97, high=1.0, n=3)
    assert interval_text("knn/top1", lopsided) == "97.00 to 100.00, n = 3"
    cases = {
        (0.1, 0.3): "above",
        (-0.3, -0.1): "below",
        (0.0, 0.0): "equal",
        (-0.1, 0.3): "open",
        (None, None): "unknown",
    }
    for (low, high), word in cases.items():
        assert verdict_of(Estimate(mean=0.0, low=low, high=high, n=3)) == word


def test_labels_near_their_points_cover_almost_nothing_while_there_is_room():
    points = [(50.0, 50.0), (50.0, 50.0), (54.0, 52.0), (50.0, 47.0)]
    markers = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    inside = Bbox.from_extents(0, 0, 200, 100)
    centres = place_labels(points, [(12.0, 9.0)] * 4, markers, inside)
    boxes = [Bbox.from_bounds(x - 6, y - 4.5, 12, 9) for x, y in centres]

    def overlap(one: Bbox, other: Bbox) -> float:
        shared = Bbox.intersection(one, other)
        return shared.width * shared.height if shared is not None else 0.0

    for i, box in enumerate(boxes):
        assert sum(overlap(box, other) for other in [*boxes[:i], *markers]) < 0.05 * 12 * 9
        assert overlap(box, inside) == pytest.approx(12 * 9)


def test_the_smallest_study_has_a_report_too(study: Summary, tmp_path: Path):
    arm = study.arm("none")
    bare = study.model_copy(
        update={
            **{name: [] for name in ("equal_generator_calls", "stores", "verdict", "cautions")},
            **{"arms": [arm.model_copy(update={"runs": arm.runs[:1], "paper": None})], "seeds": [0], "controls": {}},
            **{"paper": None, "metric": "rankme", "metrics": ["rankme"], "quick": True},
        }
    )
    assert [drawing.name for drawing in drawings(bare)] == ["cost"]
    write_report(tmp_path, bare)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert "not measured" in text
    assert "Short form." in text
    assert "one seed (0)" in text


def test_figures_differ_by_their_theme_only(study: Summary):
    drawing = next(drawing for drawing in drawings(study) if drawing.name == "storage")
    light, dark = drawing.draw(LIGHT), drawing.draw(DARK)
    assert light.get_size_inches().tolist() == dark.get_size_inches().tolist()
    assert png_of(light) == png_of(drawing.draw(LIGHT)) != png_of(dark)


def test_a_logarithmic_axis_names_even_a_lonely_value(study: Summary):
    arms = [study.arm("none"), study.arm("stored_1")]
    drawing = drawings(study.model_copy(update={"arms": arms}))[0]
    plot = drawing.draw(LIGHT).axes[0]
    assert [label.get_text() for label in plot.get_xticklabels()] == ["0", "1.437k"]
