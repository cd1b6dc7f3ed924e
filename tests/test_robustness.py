"""Artefacts with another content are refused or made anew, and the page of counts is that of its file."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from benchmarks.mutations import of_json, of_tensors
from benchmarks.robustness import PAGE, page
from benchmarks.robustness_artefacts import COUNTS, RAW, RECOMPUTED, REFUSED, SAME, SILENT, counts_of
from easyedit_moe.storage.strict_json import read_json

ARTEFACTS = {
    "moments of a layer", "Tucker basis", "null spaces", "tokens of a corpus", "target vector", "sums of a run",
    "generated texts", "patch of Tucker cores", "patch of Tucker cores with originals",
    "patch of factored update", "patch of factored update with originals", "patch of whole tensors",
    "patch of whole tensors with originals", "MEMoE adapter", "rows of compare", "rows of locate",
    "edits of a checkpoint", "records of tune",
}  # fmt: skip


def test_no_other_content_is_used_and_no_error_is_raw(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts, bad = counts_of(tmp_path, 5, every=12)
    assert bad == []
    assert set(counts) == ARTEFACTS
    for name, found in counts.items():
        total = sum(found.values(), start=type(next(iter(found.values())))())
        assert total[RAW] == total[SILENT] == 0
        assert total[REFUSED] + total[RECOMPUTED] > 0, name
        assert len(found) >= (3 if "tune" in name else 5)


def test_the_kinds_of_mutations_are_many() -> None:
    import torch

    tensors = {"a": torch.ones(3, 4), "b": torch.arange(3)}
    assert len({kind for kind, _ in of_tensors(tensors)}) >= 15
    assert len({kind for kind, _ in of_json({"a": 1, "b": {"c": [None]}})}) >= 8


@pytest.mark.parametrize("artefact", sorted(ARTEFACTS))
def test_the_committed_counts_hold_nothing_bad(artefact: str) -> None:
    counts = read_json(COUNTS)["artefacts"]
    assert counts["bad"] == []
    found = counts["counts"][artefact]
    assert sum(found["a bit changed"].values()) == 300
    assert all(set(one) <= {REFUSED, RECOMPUTED, SAME} for one in found.values())


def test_the_page_is_that_of_the_counts() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_json(COUNTS)), "run python -m benchmarks.robustness"
