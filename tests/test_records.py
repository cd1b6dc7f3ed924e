from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from easyedit_moe.errors import DataError
from easyedit_moe.records import PROTOCOLS, RecordSet, load_records, parse_records
from easyedit_moe.requests import EditRequest

SHARED = Path(__file__).parents[2] / "shared" / "data"
NEED_SHARED = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of real records is not here")

ROME = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} is in", "subject": "Angola", "relation_id": "P30",
        "target_new": {"str": "Russia", "id": "Q1"}, "target_true": {"str": "Africa", "id": "Q2"},
    },
    "paraphrase_prompts": ["Look: Angola is in", "Angola lies in"],
    "neighborhood_prompts": ["Kenya is in", "Ghana is in"],
    "attribute_prompts": [], "generation_prompts": [],
}  # fmt: skip
EASYEDIT = {
    "case_id": 7, "prompt": "Angola is in", "target_new": "Russia", "subject": "Angola", "ground_truth": "Africa",
    "rephrase_prompt": "Angola lies in", "locality_prompt": "Kenya is in", "locality_ground_truth": "Africa",
}  # fmt: skip
ZSRE = {
    "subject": "Angola", "src": "Where is Angola?", "pred": "Europe", "rephrase": "Angola is where?", "alt": "Russia",
    "answers": ["Africa", "south"], "loc": "nq question: who sang", "loc_ans": "Ana", "cond": "a >> b || c",
}  # fmt: skip


def saved(folder: Path, items: Any) -> Path:
    file = folder / "data.json"
    file.write_text(json.dumps(items), encoding="utf-8")
    return file


def only(found: RecordSet) -> Any:
    assert len(found.records) == 1
    assert found.skipped == ()
    assert found.protocol in PROTOCOLS
    return found.records[0]


def test_rome_layout(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [ROME]))
    record = only(found)
    assert found.protocol == "counterfact"
    assert record.request == EditRequest("Angola is in", "Angola", "Russia", "Africa")
    assert record.paraphrases == ("Look: Angola is in", "Angola lies in")
    assert record.neighbours == (("Kenya is in", "Africa"), ("Ghana is in", "Africa"))


def test_easyedit_layout(tmp_path: Path) -> None:
    found = load_records(str(saved(tmp_path, [EASYEDIT])))
    record = only(found)
    assert found.protocol == "counterfact"
    assert record.request == EditRequest("Angola is in", "Angola", "Russia", "Africa")
    assert record.paraphrases == ("Angola lies in",)
    assert record.neighbours == (("Kenya is in", "Africa"),)


def test_easyedit_layout_with_lists_and_without_extras() -> None:
    lists = EASYEDIT | {
        "rephrase_prompt": ["a", "b"],
        "locality_prompt": ["c", "d"],
        "locality_ground_truth": ["e", "f"],
    }
    assert only(parse_records([lists])).neighbours == (("c", "e"), ("d", "f"))
    bare = {k: EASYEDIT[k] for k in ("prompt", "subject", "target_new", "ground_truth")}
    assert only(parse_records([bare])).paraphrases == ()
    assert only(parse_records([bare])).neighbours == ()


def test_zsre_layout(tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [ZSRE]))
    record = only(found)
    assert found.protocol == "zsre"
    assert record.request == EditRequest("Where is Angola?", "Angola", "Russia", "Africa")
    assert record.paraphrases == ("Angola is where?",)
    assert record.neighbours == (("nq question: who sang", "Ana"),)


def test_single_texts_where_a_list_is_usual() -> None:
    assert only(parse_records([ZSRE | {"answers": "Africa"}])).request.ground_truth == "Africa"
    rome = only(parse_records([ROME | {"paraphrase_prompts": "Angola lies in", "neighborhood_prompts": "Kenya is in"}]))
    assert rome.paraphrases == ("Angola lies in",)
    assert rome.neighbours == (("Kenya is in", "Africa"),)


def _rewrite(**changes: Any) -> dict[str, Any]:
    return ROME | {"requested_rewrite": ROME["requested_rewrite"] | changes}


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (ROME, _rewrite(subject=""), "'subject' is empty"),
        (ROME, _rewrite(target_true=None), "'target_true' is missing"),
        (ROME, _rewrite(target_new={"str": " "}), "'target_new' is empty"),
        (ROME, ROME | {"requested_rewrite": None}, "'requested_rewrite' must be a dict"),
        (ROME, {"requested_rewrite": ROME["requested_rewrite"]}, "missing 'neighborhood_prompts'"),
        (ROME, EASYEDIT, "missing 'neighborhood_prompts'"),
        (ROME, ROME | {"paraphrase_prompts": [None]}, "must be strings"),
        (EASYEDIT, EASYEDIT | {"subject": "Peru"}, "'Peru' does not occur"),
        (EASYEDIT, EASYEDIT | {"ground_truth": None}, "'ground_truth' is missing"),
        (EASYEDIT, EASYEDIT | {"locality_prompt": ["a", "b"]}, "2 locality prompts, but 1 answers"),
        (EASYEDIT, EASYEDIT | {"locality_ground_truth": None}, "1 locality prompts, but 0 answers"),
        (EASYEDIT, EASYEDIT | {"rephrase_prompt": 5}, "must be strings"),
        (ZSRE, ZSRE | {"alt": ""}, "'target_new' is empty"),
        (ZSRE, {k: v for k, v in ZSRE.items() if k != "subject"}, "missing 'subject'"),
        (ZSRE, ZSRE | {"answers": []}, "'ground_truth' is missing"),
        (ZSRE, ZSRE | {"rephrase": None}, "must be strings"),
        (ZSRE, ZSRE | {"loc_ans": 5}, "must be strings"),
    ],
)  # fmt: skip
def test_unusable_records_are_skipped_with_the_reason(good: Any, bad: Any, reason: str, tmp_path: Path) -> None:
    found = load_records(saved(tmp_path, [good, bad, good]))
    assert len(found.records) == 2
    assert [position for position, _ in found.skipped] == [1]
    assert reason in found.skipped[0][1]


def test_no_usable_record() -> None:
    with pytest.raises(DataError, match="none of 2 records can be used; the first: 'target_new' is empty"):
        parse_records([ZSRE | {"alt": ""}] * 2)
    with pytest.raises(DataError, match="non-empty"):
        parse_records([])


def test_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown layout with the keys answer, question\. Expected CounterFact"):
        load_records(saved(tmp_path, [{"question": "?", "answer": "!"}]))


@pytest.mark.parametrize("items", [{}, {"a": 1}, [], [1], [ROME, "x"], "text", 5])
def test_not_a_list_of_records(items: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold a non-empty list of records"):
        load_records(saved(tmp_path, items))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{", encoding="utf-8")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    for name in ("a.json", "b.json"):
        with pytest.raises(DataError, match="is not valid JSON"):
            load_records(tmp_path / name)
    for missing in (tmp_path / "c.json", tmp_path, "factwold"):
        with pytest.raises(DataError, match="does not exist"):
            load_records(missing)


@NEED_SHARED
def test_real_counterfact_records() -> None:
    found = load_records(SHARED / "counterfact-edit-200.json")
    assert (found.protocol, len(found.records), found.skipped) == ("counterfact", 200, ())
    first = found.records[0]
    assert first.request == EditRequest(
        "The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English", "French"
    )
    assert first.neighbours == (("Michel Rocard is a native speaker of", "French"),)


@NEED_SHARED
def test_real_zsre_records() -> None:
    path = SHARED / "zsre-mend-100.json"
    found = load_records(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert found.protocol == "zsre"
    assert len(found.records) + len(found.skipped) == len(raw) == 100
    assert len(found.records) >= 90
    for position, reason in found.skipped:
        assert raw[position]["alt"] == "" or raw[position]["subject"] not in raw[position]["src"], reason
    assert found.records[0].request == EditRequest(
        "What is the product made by UniFirst?", "UniFirst", "unmanned aircraft", "uniform"
    )
