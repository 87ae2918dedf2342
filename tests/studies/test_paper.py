"""The paper's tables: absolute cells; differences are computed."""

from __future__ import annotations

import pytest

from genssl.config.study import Arm
from genssl.errors import ConfigError
from genssl.studies.paper import look_up, paper_cell, paper_says, paper_tables


def test_every_cell_is_a_percentage():
    for name, table in paper_tables().items():
        assert table["source"], name
        assert table["what"], name
        cells = [value for row in table["rows"].values() for value in row.values()]
        assert cells
        assert all(0 < value < 100 for value in cells)


def test_what_the_paper_calls_similar_are_distances():
    rows = paper_tables()["similarity"]["rows"]
    assert all(0 < row[name] < 1 for row in rows.values() for name in ("cka", "procrustes"))
    to_clip = [rows[name] for name in ("simclr_1_clip", "simclr_2_clip")]
    for name in ("cka", "procrustes"):  # two encoders of one kind are nearer to each other than to CLIP
        assert rows["simclr_1_simclr_2"][name] < min(row[name] for row in to_clip)


def test_rows_of_a_table_have_the_same_columns():
    for name, table in paper_tables().items():
        assert len({tuple(row) for row in table["rows"].values()}) == 1, name


def test_means_over_the_transfer_cells_are_those_recomputed_from_the_paper():
    """The mean gains over the 25 cells, as the facts give them: 4.30 and 1.81 points."""
    gains = {"stable_diffusion": [], "icgan": []}
    for name, table in paper_tables().items():
        if name.startswith("transfer_"):
            for row in table["rows"].values():
                for column, found in gains.items():
                    found.append(row[column] - row["none"])
    assert [len(found) for found in gains.values()] == [25, 25]
    assert sum(gains["stable_diffusion"]) / 25 == pytest.approx(4.30, abs=0.005)
    assert sum(gains["icgan"]) / 25 == pytest.approx(1.81, abs=0.005)


def test_a_cell_and_its_differences():
    none = Arm(name="none", paper="imagenet_linear.simclr.none")
    ours = Arm(name="sd", paper="imagenet_linear.simclr.stable_diffusion")
    cell = paper_cell(ours, {"none": none, "other": Arm(name="other")})
    assert (cell.value, cell.differences) == (68.0, {"none": 6.2})
    assert cell.source == "arXiv 2403.05966, figure 5"
    assert paper_cell(Arm(name="mine"), {"none": none}) is None


def test_what_the_cells_are_is_said_once():
    assert paper_says([]) is None
    said = paper_says(["probability.second.50", "probability.both.50"])
    assert said.count("figure 4") == 1


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("imagenet_linear.simclr.sd", "no 'sd' in the paper's tables"),
        ("figure_5.simclr.none", "no 'figure_5'"),
        ("imagenet_linear.simclr", "is not a cell"),
        ("imagenet_linear.simclr.none.more", "no 'more'"),
    ],
)
def test_what_is_no_cell_is_refused(cell, said):
    with pytest.raises(ConfigError, match=said):
        look_up(cell)
