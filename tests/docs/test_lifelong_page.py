"""The tables of the page on lifelong editing are those of its file, which names no place of a machine."""

from __future__ import annotations

import pytest

from benchmarks.lifelong import CURVES, FIRST, PAGE, updated
from easyedit_moe.storage.strict_json import read_json


def test_the_page_s_tables_are_those_of_the_file() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text, read_json(CURVES)) == text, "run python -m benchmarks.lifelong"


def test_every_run_has_the_points_that_the_tables_read_and_no_path() -> None:
    content = read_json(CURVES)
    for label, run in {**content["runs"], **content["language model"]}.items():
        edits = [point["edits"] for point in run["points"]]
        assert edits[0] == 0, label
        assert FIRST in edits, label
        assert edits == sorted(set(edits)), label
        assert all(point["utility"] is not None for point in run["points"] if point["edits"] >= FIRST), label
        shares = [value for point in run["points"] for value in point.values() if isinstance(value, str)]
        assert all(len(one) == 64 for one in shares), "weights' fingerprints are the only texts"
    text = CURVES.read_text(encoding="utf-8")
    assert not any(part in text for part in ("/tmp", "/work", "/home", "/root"))


def test_a_page_without_a_place_for_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for 'goal'"):
        updated("# A page", read_json(CURVES))
