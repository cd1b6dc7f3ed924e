"""The page of tables is made from the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from easyedit_moe.comparison.paper_report import markdown
from easyedit_moe.comparison.papers import TABLES
from easyedit_moe.comparison.saved import read_results

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "tables.md").read_text(encoding="utf-8")


def test_the_page_s_tables_are_those_of_the_files() -> None:
    found = {path.stem.partition("-")[2]: read_results(path) for path in sorted(DOCS.glob("table-*.json"))}
    assert list(found) == ["2", "4", "5", "6"]
    for name, comparison in found.items():
        assert comparison.complete
        assert comparison.provenance["table"] == name
        assert [row.method for row in comparison.rows] == ["pre-edit", *(line.label for line in TABLES[name].lines)]
        assert markdown(comparison) in PAGE, f"docs/table-{name}.json makes another table than the page has"
    assert re.findall(r"^Table (\d+):", PAGE, re.M) == list(found)
    assert {one.provenance["model_fingerprint"] for one in found.values()} == {
        read_results(DOCS / "comparison.json").provenance["model_fingerprint"]
    }


def test_results_of_earlier_versions_are_read() -> None:
    """Files of this package's comparisons, the oldest of which say neither state nor intervals."""
    for name in ("comparison", "ablations", "easyedit", "init"):
        found = read_results(DOCS / f"{name}.json")
        assert found.complete
        assert found.rows[0].method == "pre-edit"


@pytest.mark.parametrize("name", ["table-1", "no-prefixes", "dense", "table-2", "table-4", "table-5", "table-6"])
def test_real_facts_are_of_records_on_which_nothing_was_chosen(name: str) -> None:
    comparison = read_results(DOCS / f"real-{name}.json")
    assert comparison.complete
    assert comparison.provenance["skip"] >= 40
    assert f"made from real-{name}.json" in (DOCS / "real-facts.md").read_text(encoding="utf-8")
