"""The tables of the page on performance are those of the committed rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks import peak
from benchmarks.performance_page import BY_PLAN, PAGE, RESULTS, peak_tables, plan_sentence, plan_table, updated
from easyedit_moe.storage.strict_json import read_json


@pytest.fixture
def suites() -> dict[str, Any]:
    found: dict[str, Any] = read_json(RESULTS)["suites"]
    return found


def test_the_page_is_what_the_generator_makes(suites: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert updated(text, suites) == text, "python -m benchmarks.performance_page makes it again"


def test_another_figure_is_noticed(suites: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, column in (("plan", "planned / measured"), ("growth", "seconds"), ("endurance", "seconds")):
        other = copy.deepcopy(suites)
        for row in other[name]["rows"]:
            row[column] = 7.77
        assert updated(text, other) != text, name


def row(method: str, stage: str, ratio: float | None) -> dict[str, Any]:
    return {"method": method, "stage": stage, "size": "small", "planned / measured": ratio}


def test_figures_that_are_far_are_counted_and_named() -> None:
    near = [row("MoTE", "solve", 1.14), row("MoTE", "write", 0.86)]
    assert plan_sentence(near) == "All 2 figures are within 15 %."
    far = [*near, row("MEMoE", "train", 1.32), row("MEMoE", "attach", None)]
    assert plan_sentence(far) == (
        "2 of 4 figures are within 15 %; the others are MEMoE's attach - (small); MEMoE's train 1.32 (small)."
    )


def test_a_peak_that_does_not_fit_says_so() -> None:
    assert "not run at size" in peak_tables([])
    text = peak_tables([{"benchmark": BY_PLAN, **peak.planned("MoE-FT-L", 1000, 50)}])
    assert "| MoE-FT-L | train | 1.106 | 1.106 | does not fit |  |" in text


def test_a_stage_without_a_column_is_named() -> None:
    with pytest.raises(ValueError, match="no column for dance"):
        plan_table([row("MEMoE", "dance", 1.0)], ("train",), solving=False)
