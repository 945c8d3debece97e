"""Spreads and tables."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.tables import (
    cell,
    machine,
    machine_line,
    markdown_table,
    spread,
    write_results,
)


def test_spread_by_hand():
    found = spread([2.0, 4.0, None, 9.0])
    assert found is not None
    assert (found.mean, found.low, found.high) == (5.0, 2.0, 9.0)
    assert found.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))


def test_spread_of_one_has_no_deviation_and_of_none_is_none():
    one = spread([3.0])
    assert one is not None
    assert math.isnan(one.std)
    assert spread([None, None]) is None


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(0.98765, ".3f", "0.988"), (None, ".3f", "-"), (math.nan, ".1f", "-"), (40, ".0f", "40"),
     (0.0, ".1f", "0.0"), ("x", ".1f", "x")],
)  # fmt: skip
def test_cell(value, form, text):
    assert cell(value, form) == text


def test_markdown_table():
    table = markdown_table(["a", "b"], [["1", "2"], ["3", "4"]])
    assert table.splitlines() == ["| a | b |", "| :-- | --: |", "| 1 | 2 |", "| 3 | 4 |"]


def test_a_ragged_row_is_an_error():
    with pytest.raises(AssertionError, match="1 cells under 2"):
        markdown_table(["a", "b"], [["1"]])


def test_machine_says_what_matters():
    about = machine()
    assert about["cores"] >= 1
    assert about["versions"]["torch"]
    assert about["processor"] in machine_line(about)


def test_results_are_dated_twins(tmp_path):
    path = write_results(tmp_path / "new", "thing", "# hello", {"a": 1})
    assert path.name[10:] == "-thing.md"
    assert path.read_text() == "# hello\n"
    assert json.loads(path.with_suffix(".json").read_text()) == {"a": 1}
