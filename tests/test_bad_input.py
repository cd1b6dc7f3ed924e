"""Whatever is given: a typed error or success, and after either the model and all files are as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from benchmarks.record_layouts import LAYOUTS, tables
from benchmarks.robustness import commands
from benchmarks.robustness_inputs import COUNTS, KINDS, Counts, Inputs, Outcome, Section, drawn, main, merged, outcome
from easyedit_moe.errors import DataError, RequestError
from easyedit_moe.facts.records.reading import parse_records

EXAMPLES = 300


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


SECTIONS: dict[str, Callable[[Inputs], Section]] = {
    "requests": Inputs.requests,
    "hparams": Inputs.hparams,
    "files": lambda inputs: inputs.files(LAYOUTS, tables()),
    "artefact bytes": Inputs.artefact_bytes,
    "command line": Inputs.command_line,
}


@pytest.mark.parametrize("name", SECTIONS)
def test_bad_input_ends_in_a_typed_error_and_leaves_nothing_behind(name: str, inputs: Inputs) -> None:
    counts = Counts()
    for found in drawn(SECTIONS[name](inputs), EXAMPLES):
        counts.add(found)
    assert counts.bad == []
    assert sum(counts.of.values()) >= 0.9 * EXAMPLES  # hypothesis stops early where it has seen all there is
    assert counts.of["success"] >= (0 if name == "artefact bytes" else 5)
    assert counts.of["typed"] >= EXAMPLES / 4


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "sanitation"])
def test_layouts_are_read_as_they_are(name: str) -> None:
    assert len(parse_records([LAYOUTS[name]]).records) == 1


def test_sanitation_is_read_as_it_is() -> None:
    assert len(parse_records(LAYOUTS["sanitation"][0]).records) == 1


def test_outcomes_are_told_apart() -> None:
    def raises(error: Exception) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    assert outcome(lambda: 3) == Outcome("success")
    assert outcome(lambda: 3, lambda: False, anyway=True).kind == "changed"
    assert outcome(raises(DataError("no"))) == Outcome("typed")
    assert outcome(raises(DataError("no")), lambda: False) == Outcome("changed", "DataError: no")
    assert outcome(raises(RequestError(" "))).kind == "raw"
    raw = outcome(raises(KeyError("x")))
    assert (raw.kind, raw.fine) == ("raw", False)
    assert "test_bad_input.py" in raw.detail


def test_counts_are_merged() -> None:
    counts = Counts()
    for found in (Outcome("typed"), Outcome("raw", "x"), Outcome("raw", "x")):
        counts.add(found)
    first = merged({"artefacts": {"raw": 0}}, {"files": counts}, "one")
    assert first["artefacts"] == {"raw": 0}
    assert [first["files"][kind] for kind in KINDS] == [0, 1, 2, 0]
    assert (first["files"]["bad"], first["files"]["made by"]) == (["x"], ["one"])
    assert merged(first, {"files": counts}, "one") == first
    both = merged(first, {"files": counts}, "two", add=True)["files"]
    assert [both[kind] for kind in KINDS] == [0, 2, 4, 0]
    assert both["made by"] == ["one", "two"]
    assert commands(both["made by"]) == "`one`, and `two`"


def test_so_many_series_of_one_section_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    main(minutes=5, first=7, series=1, only=["hparams"], out=path)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["hparams"]
    assert sum(found["hparams"][kind] for kind in KINDS) == 100
    assert found["hparams"]["made by"] == ["python -m benchmarks.robustness_inputs --minutes 5 --first 7 --series 1"]
    with pytest.raises(typer.BadParameter, match="'hparam' is none of requests"):
        main(only=["hparam"], out=path)


def test_the_committed_counts_are_without_fault() -> None:
    found = json.loads(COUNTS.read_text(encoding="utf-8"))
    for name in [name for name in SECTIONS if name in found]:
        assert found[name]["raw"] == found[name]["changed"] == 0
        assert found[name]["typed"] > EXAMPLES
