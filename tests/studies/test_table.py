"""The CSV of a study: a column for every number, whatever arms are called."""

from __future__ import annotations

import csv

from genssl.studies.table import write_summary_csv


def test_arms_whose_names_end_like_columns_keep_columns_of_their_own(study, tmp_path):
    arms = study.arms
    ours, other = arms[0], arms[1]
    assert ours.name != other.name
    renamed = study.model_copy(
        update={
            "arms": [
                arm.model_copy(
                    update={
                        "against": ["noise", "noise_low"],
                        "name": {ours.name: "noise", other.name: "noise_low"}.get(arm.name, arm.name),
                    }
                )
                for arm in arms
            ]
        }
    )
    write_summary_csv(tmp_path / "summary.csv", renamed)
    header, *rows = csv.reader((tmp_path / "summary.csv").open())
    assert header.count("minus_noise_low") == 2, "the lower end of one difference, and another difference"
    assert all(len(row) == len(header) for row in rows)
