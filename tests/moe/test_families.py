"""Every family of transformers with experts, built tiny: edited exactly, or refused for the reason on the site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from benchmarks.families import TRAINED, Verdict, judge, table, tokenizer, works
from benchmarks.family_models import families, tiny_model
from easyedit_moe.errors import LayoutError
from easyedit_moe.moe.layers import MoELayerView

DOCS = Path(__file__).parents[2] / "docs"
PAGE: dict[str, Any] = json.loads((DOCS / "families.json").read_text(encoding="utf-8"))
ROWS = {row["family"]: Verdict(**row) for row in PAGE["families"]}
REFUSED = [name for name, row in ROWS.items() if row.status == "refused"]
same_version = pytest.mark.skipif(
    transformers.__version__ != PAGE["transformers"],
    reason=f"docs/families.json is of transformers {PAGE['transformers']}, this is {transformers.__version__}",
)


@same_version
@pytest.mark.parametrize("family", ROWS)
def test_a_family_is_edited_exactly_or_refused_as_the_site_says(family: str) -> None:
    found, row = judge(family, tokenizer(), methods=False), ROWS[family]
    assert found.status == row.status, found.why
    for name in ("model", "layers", "experts", "tail", "why", "sites"):
        assert getattr(found, name) == getattr(row, name)
    if found.status == "edited":
        assert found.sum_error < 1e-5
        assert found.planned_error < 1e-3
        assert found.within_reach == pytest.approx(row.within_reach, abs=0.05)


@same_version
def test_the_page_names_every_family() -> None:
    assert tuple(ROWS) == families()
    assert (DOCS / "families.md").read_text(encoding="utf-8") == table(list(ROWS.values()))
    assert len(ROWS) - len(REFUSED) >= 66


@same_version
@pytest.mark.parametrize("family", [name for name in REFUSED if ROWS[name].model])
def test_what_trains_works_on_refused_families_as_the_site_says(family: str) -> None:
    found = [method for method in TRAINED if works(tiny_model(family), tokenizer(), method)]
    assert found == ROWS[family].methods


@same_version
def test_refusals_are_typed_and_say_why() -> None:
    for name in REFUSED:
        assert len(ROWS[name].why) > 40
    with pytest.raises(LayoutError, match="encoder"):
        MoELayerView(tiny_model("switch_transformers"))
