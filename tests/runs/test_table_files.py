"""A reproduction's tables as CSV and LaTeX."""

import csv
import json
import math

import pytest

from bezoar.runs import table_files

MEASURE = {"value": 0.981, "low": 0.96, "high": 0.99, "n": 484, "how": "a share"}
TABLE = {
    "name": "mine/table",
    "title": "Success & failure, 100 %",
    "axis": "poisons_used",
    "rows": [
        {
            "name": "3",
            "x": 3.0,
            "curve": "patch",
            "cells": [
                {
                    "name": "ASR",
                    "rate": True,
                    "printed": 0.97,
                    "measure": MEASURE,
                    "runs": ["a", "b"],
                },
                {
                    "name": "z",
                    "rate": False,
                    "printed": None,
                    "measure": {"value": 12.34, "low": "-Infinity", "high": "Infinity", "n": 2},
                    "runs": [],
                },
            ],
        },
        {"name": "0", "x": None, "curve": "", "cells": []},
    ],
}


def test_a_line_a_cell(tmp_path):
    table_files.write_table_files(tmp_path, [TABLE])
    rows = list(csv.DictReader((tmp_path / "tables.csv").open()))
    assert len(rows) == 2
    assert rows[0] == {
        "table": "mine/table",
        "curve": "patch",
        "row": "3",
        "x": "3.0",
        "cell": "ASR",
        "value": "0.981",
        "low": "0.96",
        "high": "0.99",
        "n": "484",
        "printed": "0.97",
        "runs": "a b",
    }
    assert rows[1]["printed"] == "" and float(rows[1]["high"]) == math.inf
    json.dumps(rows)


def test_latex_has_our_number_its_interval_and_the_printed_one():
    text = table_files.latex_table(TABLE)
    assert r"\caption{Success \& failure, 100 \%. Brackets" in text
    assert r"poisons\_used & ASR & z \\" in text
    assert r"patch, 3 & 98.1 [96.0, 99.0] (p 97.0) & 12.3 [$-\infty$, $\infty$] \\" in text
    assert r"0 & -- & -- \\" in text


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.50"), (-12.0, "-12.0"), (math.nan, "--")])
def test_numbers(value, text):
    assert table_files.format_number(value) == text
