"""Files of facts: tables, JSON lines, JSON lists; what is wrong with a line is said of that line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from record_files import EASYEDIT, KNOWEDIT_ZSRE, ROME, WIKIBIGEDIT, ZSRE, saved

from easyedit_moe.errors import DataError, EditingWarning
from easyedit_moe.facts.records import EvaluationRecord, FactSet, Probe, ProbeGroup, load_facts, load_records
from easyedit_moe.facts.requests import EditRequest, check_batch

ANGOLA = EditRequest("Angola is in", "Angola", "Rome, or so", "Africa")
KENYA = EditRequest("Kenya is in", "Kenya", "1969", None)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, name: str, content: str | bytes, **options: Any) -> FactSet:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_facts(written(folder, name, content), **options)


HEAD = "prompt,subject,target_new,ground_truth"
ROW = 'Angola is in,Angola,"Rome, or so",Africa'
DICT = '{"prompt": "Angola is in", "subject": "Angola", "target_new": "Rome, or so", "ground_truth": %s}'
OTHER = '{"prompt": "Kenya is in", "subject": "Kenya", "target": 1969, "ground_truth": NaN, "case_id": 3}'
SEMICOLONS = "Angola is in;Angola;Rome, or so;Africa\r\nKenya is in;Kenya;1969;\r\n"
FILES = {
    "a.csv": f"{HEAD}\n{ROW}\nKenya is in,Kenya,1969,\n",
    "a.CSV": f"{HEAD}\n{ROW}\nKenya is in,Kenya,1969,#N/A\n",
    "bom.csv": f"\ufeff{HEAD}\r\n{ROW}\r\nKenya is in,Kenya,1969,",
    "semicolon.csv": HEAD.replace(",", ";") + "\r\n" + SEMICOLONS,
    "sep.csv": "sep=;\n" + HEAD.replace(",", ";") + "\n" + SEMICOLONS,
    "old-mac.csv": f"{HEAD}\r{ROW}\rKenya is in,Kenya,1969,\r",
    "spaces.csv": f"Prompt , Subject, New Target,Ground-Truth\n{ROW.replace(',A', ', A')}\nKenya is in, Kenya,1969,NaN",
    "short-rows.csv": f"{HEAD}\n{ROW}\n\n,,,\nKenya is in,Kenya,1969\n",
    "a.tsv": "prompt\tsubject\tanswer\ttarget_true\n" + SEMICOLONS.replace(";", "\t"),
    "a.jsonl": DICT % '"Africa"' + f"\r\n\r\n{OTHER}",
    "a.json": "\ufeff[" + DICT % '["Africa", "south"]' + f", {OTHER}]",
}


@pytest.mark.parametrize("name", FILES)
def test_formats_are_read_alike(name: str, tmp_path: Path) -> None:
    found = read(tmp_path, name, FILES[name])
    assert [record.request for record in found.facts] == [ANGOLA, KENYA]
    assert (found.skipped, found.dropped, found.unknown_columns) == ((), (), ())
    assert found.protocol == "token_accuracy"
    judged = load_records(tmp_path / name)
    assert (judged.records, judged.protocol) == (found.facts[:1], "counterfact")  # half of them have a true answer


def test_numbers_are_texts_as_they_were_written(tmp_path: Path) -> None:
    text = '[{"prompt": "1984 is by", "subject": 1984, "target_new": 1.50, "ground_truth": 7}]'
    assert read(tmp_path, "a.json", text).facts[0].request == EditRequest("1984 is by", "1984", "1.50", "7")
    portability = (
        '[{"prompt": "A is", "subject": "A", "target_new": "b", "portability": [{"prompt": "p", "answer": 2e3}]}]'
    )
    assert read(tmp_path, "b.json", portability).facts[0].portability[0].probes == (Probe("p", ("2E+3",)),)
    for layout, key, name in ((ZSRE, "answers", "z"), (WIKIBIGEDIT, "ans", "w"), (KNOWEDIT_ZSRE, "target_new", "k")):
        assert read(tmp_path, f"{name}.json", json.dumps([layout | {key: 12}])).facts[0].request.target_new == "12"
    rome = ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"target_new": {"str": 12}}}
    assert read(tmp_path, "r.json", json.dumps([rome])).facts[0].request.target_new == "12"


CELLS = {
    "rephrase": "Where is Angola? | Angola lies in",
    "neighbours": "Kenya is in => Africa | Ghana is in",
    "portability": "Angola's sea is => the Atlantic",
}
RECORD = EvaluationRecord(
    EditRequest("Angola is in", "Angola", "Rome", None),
    ("Where is Angola?", "Angola lies in"),
    (("Kenya is in", "Africa"),),
    portability=(ProbeGroup("portability", (Probe("Angola's sea is", ("the Atlantic",)),)),),
    unanswered=("Ghana is in",),
)


def table(columns: dict[str, str]) -> str:
    cells = {"prompt": "Angola is in", "subject": "Angola", "target_new": "Rome", **columns}
    return ",".join(cells) + "\n" + ",".join('"' + cell.replace('"', '""') + '"' for cell in cells.values()) + "\n"


@pytest.mark.parametrize(
    "columns",
    [
        CELLS,
        {
            "paraphrases": '["Where is Angola?", "Angola lies in"]',
            "neighborhood": '[{"prompt": "Kenya is in", "answer": "Africa"}, "Ghana is in"]',
            "portability": '{"prompt": "Angola\'s sea is", "ground_truth": ["the Atlantic"]}',
        },
        {
            "rephrase_1": "Where is Angola?",
            "Rephrase 2": "Angola lies in",
            "locality_prompt": "Kenya is in=> Africa => Africa | Ghana is in",
            "portability_prompt": "Angola's sea is",
            "portability_ground_truth": "the Atlantic",
        },
    ],
    ids=["bars and arrows", "json", "numbered columns"],
)
def test_several_texts_in_a_cell(columns: dict[str, str], tmp_path: Path) -> None:
    (record,) = read(tmp_path, "a.csv", table(columns)).facts
    if "locality_prompt" in columns:
        assert record.neighbours == (("Kenya is in=> Africa", "Africa"),)  # the last arrow counts
        record = EvaluationRecord(**{**vars(record), "neighbours": RECORD.neighbours})
    assert record == RECORD


def test_bars_are_texts_in_json_and_slots_too(tmp_path: Path) -> None:
    item = {"prompt": "a {} | b is", "target_new": "x | {}", "rephrase": "p | q"}
    (record,) = read(tmp_path, "a.json", json.dumps([item])).facts
    assert record.request == EditRequest("a {} | b is", None, "x | {}", None)
    assert record.paraphrases == ("p | q",)


def test_answers_of_neighbours_in_a_column_of_their_own(tmp_path: Path) -> None:
    good = {"neighbours": "Kenya is in | Ghana is in", "neighbour_answers": "Africa | the west"}
    (record,) = read(tmp_path, "a.csv", table(good)).facts
    assert record.neighbours == (("Kenya is in", "Africa"), ("Ghana is in", "the west"))
    with pytest.raises(DataError, match="line 2: 2 locality prompts, but 1 answers"):
        read(tmp_path, "b.csv", table(good | {"neighbour_answers": "Africa"}))


def test_groups_of_any_name(tmp_path: Path) -> None:
    item = EASYEDIT | {"locality": {"mine": {"prompt": ["p", "q"], "ground_truth": ["a", "b"]}}}
    del item["locality_prompt"], item["locality_ground_truth"]
    (record,) = read(tmp_path, "a.json", json.dumps([item])).facts
    assert record.neighbours == (("p", "a"), ("q", "b"))
    assert record.locality == (ProbeGroup("mine", (Probe("p", ("a",)), Probe("q", ("b",)))),)


BAD = """prompt,subject,target_new,rephrase
Angola is in,Angola,Rome,
Kenya is in,Ghana,Rome,
Kenya is in,Kenya,,
"Peru is
in",Peru,Lima,
Chile is in,Chile,Rome, Oslo,more
Togo is,Togo,"a "b" c",
Mali is,Mali,"never closed,
Chad is,Chad,Oslo,"[""a"", "
Niger is,Niger,Oslo,
"""


def test_bad_lines_are_named_and_do_not_stop_the_others(tmp_path: Path) -> None:
    found = read(tmp_path, "a.csv", BAD)
    assert [record.request.subject for record in found.facts] == ["Angola", "Peru", "Niger"]
    assert found.numbers == (2, 5, 11)
    assert [number for number, _ in found.skipped] == [3, 4, 7, 8, 9, 10]
    reasons = [reason for _, reason in found.skipped]
    expected = [
        "does not occur",
        "'target_new' is missing or empty",
        "5 cells under 4",
        "quotes",
        "quotes",
        "not valid",
    ]
    assert all(part in reason for part, reason in zip(expected, reasons, strict=True)), reasons
    assert found.unit == "line"
    with pytest.raises(DataError, match=r"as a whole, which strict asks for: line 3: .*; line 9: .*; and 1 more$"):
        load_facts(tmp_path / "a.csv", strict=True)
    kept = load_records(tmp_path / "a.csv")
    assert [number for number, _ in kept.skipped] == [3, 4, 7, 8, 9, 10]
    assert kept.records == found.facts


def test_bad_lines_of_json_lines_and_lists(tmp_path: Path) -> None:
    good, bad = '{"prompt": "A is", "target": "b"}', '{"prompt": "B is", "target": true}'
    lines = read(tmp_path, "a.jsonl", f'\n{good}\n{{"prompt": \n5\n{bad}\n')
    assert (lines.numbers, [number for number, _ in lines.skipped], lines.unit) == ((2,), [3, 4, 5], "line")
    assert "'target_new' must be a string; found True" in lines.skipped[2][1]
    listed = read(tmp_path, "a.json", f"[5, {good}, {bad}]")
    assert (listed.numbers, [number for number, _ in listed.skipped], listed.unit) == ((1,), [0, 2], "record")
    with pytest.raises(DataError, match="record 0: A record must be a dict"):
        load_facts(tmp_path / "a.json", strict=True)


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    item = {"prompt": "A\u2028is\x85", "target": "b"}
    (record,) = read(tmp_path, "a.jsonl", json.dumps(item, ensure_ascii=False)).facts
    assert record.request.prompt == item["prompt"]


def test_facts_that_repeat_or_contradict_are_refused_with_both_lines(tmp_path: Path) -> None:
    rows = [
        "Zoe\u0301 is,Zoe\u0301,b",
        "Kenya is in,Kenya,x",
        "Zo\u00e9  is,Zo\u00e9,b",
        "Kenya is in,Kenya,y",
        "Kenya is in ,Kenya,x",
    ]
    found = read(tmp_path, "a.csv", "prompt,subject,target_new\n" + "\n".join(rows))
    assert found.numbers == (2, 3)
    assert found.skipped == (
        (4, "the same fact as line 2."),
        (5, "conflicts with line 3: 'Kenya is in' -> 'y' here, 'x' there. Keep one."),
        (6, "the same fact as line 3."),
    )
    check_batch([record.request for record in found.facts])
    with pytest.raises(DataError, match="line 4: the same fact as line 2"):
        load_facts(tmp_path / "a.csv", strict=True)


def test_unknown_columns_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "prompt,target_new,rephrse,note,,note\nA is,b,,,,\n")
    for load in (load_facts, load_records):
        with pytest.warns(EditingWarning, match=r"unknown columns.*'rephrse' \(did you mean 'rephrase'\?\), 'note'"):
            found = load(path)
        assert tuple(getattr(found, "unknown_columns", ("rephrse", "note"))) == ("rephrse", "note")
    path = written(tmp_path, "a.json", '[{"prompt": "A is", "target": "b"}, {"prompt": "B is", "target": "b", "x": 1}]')
    with pytest.warns(EditingWarning, match="unknown columns, which are not used: 'x'"):
        found = load_facts(path)
    assert found.unknown_columns == ("x",)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "", "is empty"),
        ("a.json", " \n", "is empty"),
        ("a.csv", "\ufeff", "is empty"),
        ("a.csv", "prompt,subject,target_new\n", "holds a header, but no facts"),
        ("a.csv", "Angola is in,Angola,Rome\nA is,A,b\n", "has no header: .*semicolons or tabs; found 'Angola"),
        ("a.tsv", "prompt,subject,target_new\nA is,A,b\n", "has no header: .*separated by tabs"),
        ("a.csv", "prompt,subject\nA is,A\n", "lacks the column target_new; found the columns prompt, subject"),
        ("a.csv", "prompt,target_new,target\nA is,b,c\n", "'target_new' and 'target' are both target_new"),
        ("a.csv", 'prompt,target_new\n"A is,b\n', "none of 1 records can be used; the first, line 2: its quotes"),
        ("a.csv", "prompt,target_new\nM\xfcnchen is,x\n".encode("latin-1"), "not UTF-8: line 2 holds the byte 0xfc"),
        ("a.csv", "prompt,target_new\nA is,x\n".encode("utf-16"), "UTF-16"),
        ("a.csv", "prompt,target_new\nA is,x\n".encode("utf-16-le"), "UTF-16"),
        ("a.json", '[{"prompt": "A is", "tar', "not valid JSON.*cut off"),
        ("a.json", '[{"prompt": "A is"},', "not valid JSON.*cut off"),
        ("a.json", '{"prompt": "A"}\n{"prompt": "B"}', r"one fact per line, name it \.jsonl"),
        ("a.jsonl", '[\n{"prompt": "A is"}, \n]', r"[Nn]ame it \.json"),
        ("a.jsonl", '[{"prompt": "A is", "target": "b"}]', r"[Nn]ame it \.json"),
        ("a.jsonl", '{"prompt": "A', "no line can be read; line 1"),
        ("a.xlsx", b"PK\x03\x04", r"\.xlsx files are not read"),
        ("a.txt", "prompt,target\n", r"not valid JSON.*Known suffixes: \.json, \.jsonl, \.csv, \.tsv"),
        ("a.json", "[" * 100_000, "not valid JSON"),
    ],
)  # fmt: skip
def test_files_that_are_refused(name: str, content: str | bytes, match: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    for load in (load_facts, load_records):
        with pytest.raises(DataError, match=match):
            load(path)


@pytest.mark.parametrize("layout", [ROME, EASYEDIT, ZSRE, KNOWEDIT_ZSRE, WIKIBIGEDIT])
def test_layouts_of_benchmarks_need_only_prompt_and_target_to_be_edited(layout: dict[str, Any], tmp_path: Path) -> None:
    whole = load_facts(saved(tmp_path, [layout]))
    assert whole.facts == load_records(tmp_path / "data.json").records
    assert whole.protocol == load_records(tmp_path / "data.json").protocol
    needed = {"requested_rewrite", "prompt", "src", "update", "target_new", "answers", "ans"}
    bare = {key: value for key, value in layout.items() if key in needed}
    if "requested_rewrite" in bare:
        bare["requested_rewrite"] = {"prompt": "Angola is in", "target_new": {"str": "Russia"}}
    (record,) = load_facts(saved(tmp_path, [bare])).facts
    request = whole.facts[0].request
    assert record.request == EditRequest(request.prompt, None, request.target_new, None)


def test_rome_neighbours_without_a_true_answer_have_none(tmp_path: Path) -> None:
    item = ROME | {"requested_rewrite": {**ROME["requested_rewrite"], "target_true": None}}
    found = load_facts(saved(tmp_path, [ROME, item]))
    assert [len(record.neighbours) for record in found.facts] == [2]  # the same fact twice
    found = load_facts(saved(tmp_path, [item]))
    assert (found.facts[0].unanswered, found.facts[0].neighbours) == (("Kenya is in", "Ghana is in"), ())


def test_records_without_true_answers_are_judged_by_token_accuracy(tmp_path: Path) -> None:
    bare = {key: EASYEDIT[key] for key in ("prompt", "subject", "target_new")}
    other = bare | {"prompt": "Angola was in"}
    found = load_records(saved(tmp_path, [bare, other, EASYEDIT]))
    assert (found.protocol, len(found.records), found.skipped) == ("token_accuracy", 3, ())
    found = load_records(saved(tmp_path, [bare, EASYEDIT]))
    assert (found.protocol, len(found.records)) == ("counterfact", 1)
    assert found.skipped == ((0, "missing the true answer ('ground_truth'), which other records of this file have"),)
    assert load_facts(saved(tmp_path, [other, EASYEDIT])).protocol == "token_accuracy"
    assert load_facts(saved(tmp_path, [EASYEDIT])).protocol == "counterfact"


def test_bundled_data_are_facts() -> None:
    assert len(load_facts("factworld").facts) == len(load_records("factworld").records)
    with pytest.raises(DataError, match=r"does not exist\. Bundled data: factworld"):
        load_facts("factwold")
