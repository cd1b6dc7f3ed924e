"""The tables of the page on performance are those of the committed rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peak
from benchmarks.performance_page import (
    BY_PLAN,
    FIGURES,
    PAGE,
    RESULTS,
    newest_suites,
    peak_tables,
    plan_sentence,
    plan_table,
    updated,
    versions_table,
)
from benchmarks.versions import compared
from easyedit_moe.storage.strict_json import write_json


@pytest.fixture
def suites() -> dict[str, Any]:
    return newest_suites(RESULTS)


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


def test_of_each_suite_the_rows_that_were_made_last_count(tmp_path: Path) -> None:
    def suite(date: str, commit: str | None, rows: int) -> dict[str, Any]:
        return {"source": {"date": date, "commit": commit}, "rows": [{}] * rows}

    files = {
        "a": (False, {"plan": suite("2026-11-29", "abc", 1), "peak": suite("2026-11-02", None, 2)}),
        "b": (
            False,
            {"plan": suite("2026-11-29", None, 3), "peak": suite("2026-11-03", None, 4), "cores": {"rows": []}},
        ),
        "c": (True, {"plan": suite("2026-12-01", "abc", 5)}),
    }
    for name, (quick, found) in files.items():
        write_json(tmp_path / f"{name}.json", {"schema": 2, "quick": quick, "suites": found})
    assert {name: len(one["rows"]) for name, one in newest_suites(tmp_path).items()} == {
        "plan": 1, "peak": 4, "cores": 0,
    }  # fmt: skip


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


def test_peaks_at_full_width_are_those_of_planted_parts() -> None:
    def found(scale: int) -> dict[str, Any]:
        share = 1 / scale
        return {
            "method": "MoTE", "edits": 9, "batch": 3, "widths divided by": scale, "prepared": 10,
            "peak of preparing": 100 + 7e9 * share + 1e9 * share**2, "peak of edits": 40 + 5e9 * share**2,
        }  # fmt: skip

    row = peak.at_full_width([found(16), found(8), found(4)])
    assert row["largest"] == "preparing"
    assert row["fixed bytes"] == pytest.approx(100, abs=0.01)
    assert row["bytes by the widths"] == pytest.approx(7e9)
    assert row["bytes by their square"] == pytest.approx(1e9)
    assert row["peak / model"] == pytest.approx(1 + 8e9 / row["model bytes"])
    assert row["editing / model"] == pytest.approx(1 + 5e9 / row["model bytes"])
    assert not row["within"]
    assert "| MoTE | preparing | 0.00 | 7.00 | 1.00 | 1.131 | 1.082 |" in peak_tables([row])


def test_figures_of_two_versions_stand_side_by_side() -> None:
    before, after = (dict.fromkeys(FIGURES, number) for number in (3e6, 2e6))
    rows = [{"method": "MoTE", "remember_edits": True, **one} for one in compared([before], [after])]
    assert "| MoTE | yes |" in versions_table(rows)
    assert "| 3e+06 / 2e+06 = 1.50 |" in versions_table(rows)
    assert "| 3 / 2 = 1.50 |" in versions_table(rows), "bytes in MB"


def test_a_stage_without_a_column_is_named() -> None:
    with pytest.raises(ValueError, match="no column for dance"):
        plan_table([row("MEMoE", "dance", 1.0)], ("train",), solving=False)
