"""Figures in README and docs are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.result_pages import BLOCK, ROOT, made, pages

PAGES = pages()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_has_the_figures_of_its_files(path: Path) -> None:
    assert PAGES[path] == made(PAGES[path]), "python -m benchmarks.result_pages makes it again"


def test_every_method_has_its_figures() -> None:
    kinds = {found[3] for text in PAGES.values() for found in BLOCK.finditer(text)}
    assert {"all", "scores", "short", "host", "MoTE", "MoEEdit-BCD", "Global", "UnKE", "MEMoE"} <= kinds
    assert ROOT / "README.md" in PAGES


def test_another_figure_is_noticed() -> None:
    text = PAGES[ROOT / "README.md"]
    other = re.sub(r"\| MoTE \| \d+", "| MoTE | 12", text)
    assert other != text
    assert made(other) == text


def test_a_row_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"'MoTEE' is none of all.*, nor a row of comparison\.json"):
        made("<!-- made from comparison.json: MoTEE -->\n<!-- end -->")
