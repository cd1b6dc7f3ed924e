"""The paper's tables as data: what each row means, and when published figures stand beside ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer
from tiny_comparison import tiny_hparams, tiny_records

from easyedit_moe.comparison import papers
from easyedit_moe.comparison.compare import Comparison, compare
from easyedit_moe.comparison.paper_report import folder_of, header, lines, markdown, write_overview, write_table
from easyedit_moe.comparison.papers import TABLES, PaperTable, known_model, published_for
from easyedit_moe.comparison.saved import read_results
from easyedit_moe.comparison.task import Task
from easyedit_moe.editors import method_names
from easyedit_moe.evaluation.routing import routing_windows
from easyedit_moe.facts.records import parse_records
from easyedit_moe.hparams import hyperparams_class, models, presets

FIRST = ("The mother tongue of Danielle Darrieux is", "English")
THOUSAND = {"edits": 1000, "batch_size": 50, "skip": 0, "protocol": "counterfact"}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rows_have_names_of_their_own_and_settings_that_their_methods_have(table: PaperTable) -> None:
    assert len({line.label for line in table.lines}) == len(table.lines)
    for line in table.lines:
        method = presets.find_method(line.method)
        if line.changes:
            values = {"alg_name": line.method, "model_name": "any", "layers": [1], **line.changes}
            assert hyperparams_class(line.method).from_dict(values).alg_name == method.name


def test_table_1_has_every_method() -> None:
    hosts = {method.name for method in presets.host_methods()}
    own = set(method_names()) - {"BCD+speedup", "Global+speedup"}  # solvers, which table 2 compares
    assert {line.method for line in TABLES["1"].lines} == own | hosts


@pytest.fixture
def real(tmp_path: Path) -> dict[str, str]:
    """Folders of the three models, with their configurations alone."""
    found = {}
    for stem, name in {"qwen3-30b-a3b": "Qwen3-30B-A3B", "gpt-oss-20b": "gpt-oss-20b"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(models.OUTLINES[stem]))
        found[stem] = str(tmp_path / name)
    return found


def test_a_model_is_known_by_its_name_and_its_sizes(real: dict[str, str], tmp_path: Path) -> None:
    assert [known_model(path) for path in real.values()] == list(real)
    Path(real["gpt-oss-20b"]).rename(tmp_path / "gpt-oss-20b-mine")
    assert known_model(str(tmp_path / "gpt-oss-20b-mine")) is None
    smaller = {**models.OUTLINES["qwen3-30b-a3b"], "num_hidden_layers": 8}
    (Path(real["qwen3-30b-a3b"]) / "config.json").write_text(json.dumps(smaller))
    assert known_model(real["qwen3-30b-a3b"]) is None, "a smaller model of the same name is another one"
    assert known_model("factworld") is None


@pytest.mark.parametrize(
    "other",
    [{"edits": 999}, {"batch_size": 100}, {"skip": 1}, {"protocol": "zsre"}, {"table": "5"}, {"model": None},
     {"model": "factworld"}, {"first": ("The mother tongue of Danielle Darrieux is", "Polish")}],
    ids=str,
)  # fmt: skip
def test_published_figures_need_the_same_model_data_and_edits(other: dict[str, Any]) -> None:
    def ask(table: str = "2", model: str | None = "gpt-oss-20b", first: tuple[str, str] = FIRST, **about: Any) -> Any:
        return published_for(TABLES[table], {**THOUSAND, **about}, model, first)

    found = ask()
    assert (found.hardware, found.model) == ("H200", "gpt-oss-20b")
    assert found.figures["MoTE (paper)"] == papers.Figures(94.60, 37.55, 81.85, 88.9)
    assert ask(**other) is None


def test_published_figures_name_rows_of_their_table() -> None:
    for found in papers.PUBLISHED:
        assert set(found.figures) <= {line.label for line in TABLES[found.table].lines}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    found = parse_records(tiny_records())
    about = {"model": "tiny", "edits": 4, "batch_size": 2, "protocol": "counterfact", "table": "2", "published": None}
    task = Task(tiny_model(), tiny_tokenizer(), found.records, found.protocol, 2, about)
    hparams = hyperparams_class("Global").from_dict(tiny_hparams(tmp_path_factory.mktemp("made"), "Global"))
    return compare(task, [hparams, hparams], None, ["MoEEdit-BCD", "Global"], progress=False)


def test_published_figures_stand_beside_ours(made: Comparison, tmp_path: Path) -> None:
    table = TABLES["2"]
    assert not any("paper" in name for name in header(table, made))
    published = published_for(table, THOUSAND, "qwen3-30b-a3b", FIRST)
    beside = replace(made, provenance={**made.provenance, "published": published.to_dict()})
    names = header(table, beside)
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in lines(table, beside)}
    assert names[-4:] == ["paper: efficacy", "paper: generalisation", "paper: specificity", "paper: s (H200)"]
    assert [rows["MoEEdit-BCD"][name] for name in names[-4:]] == ["97.90", "86.50", "83.45", "477.0"]
    assert {rows["Global"][name] for name in names[-4:]} == {"-"}, "the paper has no such row"
    paths = write_table(beside, tmp_path / "out")
    assert "paper: s (H200)" in paths[1].read_text()
    assert markdown(read_results(paths[0])) == paths[1].read_text(), "the file alone makes the table"


def test_the_overview_has_every_complete_table_of_the_folder(made: Comparison, tmp_path: Path) -> None:
    for name, data, complete in (("4", "counterfact", True), ("2", "counterfact", True), ("1", "zsre", False)):
        one = replace(made, provenance={**made.provenance, "table": name}, complete=complete)
        write_table(one, folder_of(TABLES[name], data, tmp_path))
    assert (tmp_path / "table-1-zsre" / "results.json").is_file()
    text = write_overview(tmp_path).read_text()
    assert [line[:8] for line in text.splitlines() if line.startswith("Table")] == ["Table 2:", "Table 4:"]


def test_seconds_are_split_and_added_up(made: Comparison) -> None:
    names = header(TABLES["2"], made)
    row = dict(zip(names, lines(TABLES["2"], made)[1], strict=True))
    seconds = made.rows[1].seconds
    assert row["spread"] == "residual"
    assert float(row["total s"]) == pytest.approx(seconds["solve"] + seconds["write"], abs=0.006)
    assert float(row["targets s"]) == pytest.approx(seconds["targets"], abs=0.06)


def test_routing_is_shown_by_window(made: Comparison, tmp_path: Path) -> None:
    table, layers = TABLES["4"], made.rows[1].routing["edit"]["per_layer"]
    named = replace(made, provenance={**made.provenance, "table": "4"})
    row = dict(zip(header(table, named), lines(table, named)[1], strict=True))
    first, last = routing_windows(len(layers))[1]
    assert row[f"edit, middle {first}-{last}"] == f"{layers[first]:.1f}"
    assert row["preservation, all layers"] == f"{made.rows[1].routing['preservation']['mean']:.1f}"
    first_schema = [replace(r, routing={k: {**v, "windows": None} for k, v in r.routing.items()}) for r in made.rows]
    assert "edit, middle" in header(table, replace(named, rows=tuple(first_schema)))
    assert write_table(named, tmp_path / "out")[2].read_bytes().startswith(b"\x89PNG")
