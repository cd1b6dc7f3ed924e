"""EasyEdit's datasets as records. The tests that take ``host`` run EasyEdit's own classes and need a checkout of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from record_files import (
    EASYEDIT,
    KNOWEDIT_ZSRE,
    NEED_SHARED,
    ROME,
    SHARED,
    WIKI_COUNTERFACT,
    WIKI_RECENT,
    WIKIBIGEDIT,
    WIKIBIO,
    ZSRE,
    saved,
)

from easyedit_moe.errors import DataError
from easyedit_moe.facts.records import RecordSet, load_records, parse_records
from easyedit_moe.host.datasets import easyedit_requests, records_from

ZSRE_FILE = [
    ZSRE,
    ZSRE | {"alt": ""},
    ZSRE | {"subject": "Peru", "src": "Where is Peru?", "rephrase": "Peru is where?"},
    ZSRE | {"subject": "Chile", "src": "Where is Cuba?"},  # its subject does not occur
    ZSRE | {"subject": "Fiji", "src": "Where is Fiji?"},
    ZSRE | {"alt": ""},
]


class ZsreDataset(list):
    """Items as EasyEdit's class of this name makes them (without "cond", which nobody reads)."""

    def __init__(self, raws: list[dict[str, Any]], size: int | None = None) -> None:
        kept = [(number, raw) for number, raw in enumerate(raws) if raw["alt"]]
        super().__init__(
            {
                "case_id": number, "prompt": raw["src"], "target_new": raw["alt"], "ground_truth": raw["answers"][0],
                "rephrase_prompt": raw["rephrase"], "locality_prompt": raw["loc"],
                "locality_ground_truth": raw["loc_ans"], "cond": "",
            }
            for number, raw in kept[:size]
        )  # fmt: skip


def _positions(found: RecordSet) -> list[int]:
    return [number for number, _ in found.skipped]


def test_the_subject_is_read_back_from_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, ZSRE_FILE)
    found = records_from(ZsreDataset(ZSRE_FILE), path)
    assert found == load_records(path, "zsre-alternative")
    assert [record.request.subject for record in found.records] == ["Angola", "Peru", "Fiji"]
    assert _positions(found) == [1, 3, 5]


def test_size_counts_what_the_dataset_keeps(tmp_path: Path) -> None:
    path = saved(tmp_path, ZSRE_FILE)
    found = records_from(ZsreDataset(ZSRE_FILE, size=2), path)
    assert [record.request.subject for record in found.records] == ["Angola", "Peru"]
    assert _positions(found) == [1]
    assert _positions(records_from(ZsreDataset(ZSRE_FILE, size=4), path)) == [1, 3, 5]
    assert found == parse_records(ZSRE_FILE[:3], protocol="zsre-alternative")


def test_the_path_may_be_the_dataset_s_own(tmp_path: Path) -> None:
    dataset = ZsreDataset(ZSRE_FILE)
    with pytest.raises(DataError, match=r"drops the subject of each record, which editing needs\. Pass path="):
        records_from(dataset)
    dataset.data_dir = saved(tmp_path, ZSRE_FILE)
    assert records_from(dataset) == load_records(dataset.data_dir, "zsre-alternative")


def test_a_shuffled_part_of_a_dataset_is_aligned_by_its_numbers(tmp_path: Path) -> None:
    part = [ZsreDataset(ZSRE_FILE)[i] for i in (3, 0)]
    found = records_from(part, saved(tmp_path, ZSRE_FILE))
    assert [record.request.subject for record in found.records] == ["Fiji", "Angola"]


def test_wrong_numbers_do_not_matter_where_contents_agree(tmp_path: Path) -> None:
    moved = [ZSRE | {"alt": ""}, {"not": "a record"}, *ZSRE_FILE]
    found = records_from(ZsreDataset(ZSRE_FILE), saved(tmp_path, moved))
    assert found.records == load_records(tmp_path / "data.json", "zsre-alternative").records
    assert _positions(found) == [0, 3, 5]


def test_another_file_is_refused(tmp_path: Path) -> None:
    other = [raw | {"src": raw["src"].replace("Peru", "Malta")} for raw in ZSRE_FILE]
    with pytest.raises(DataError, match=r"Record 1 of the ZsreDataset, 'Where is Peru\?', is not in"):
        records_from(ZsreDataset(ZSRE_FILE), saved(tmp_path, other))
    with pytest.raises(DataError, match=r"Record 1 of .* occurs there less often"):
        records_from(ZsreDataset([ZSRE, ZSRE]), saved(tmp_path, [ZSRE]))
    with pytest.raises(DataError, match="must hold a list"):
        records_from(ZsreDataset(ZSRE_FILE), saved(tmp_path, {"a": 1}))
    with pytest.raises(DataError, match="does not exist"):
        records_from(ZsreDataset(ZSRE_FILE), tmp_path / "missing.json")


def test_ambiguous_subjects_are_refused_unless_the_number_decides(tmp_path: Path) -> None:
    twins = [ZSRE | {"src": "Where is Angola, Asia?", "subject": name} for name in ("Angola", "Asia")]
    dataset = ZsreDataset(twins)
    path = saved(tmp_path, twins)
    assert records_from(dataset, path) == load_records(path, "zsre-alternative")
    for item in dataset:
        item["case_id"] += 7
    with pytest.raises(DataError, match=r"could be any of the records 0, 1 of .* which differ in subject"):
        records_from(dataset, path)


def test_a_host_that_keeps_the_subject_needs_no_file() -> None:
    items = ZsreDataset([ZSRE])
    items[0]["subject"] = "Angola"
    assert records_from(items) == parse_records([ZSRE], protocol="zsre-alternative")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (5, "Expected one of EasyEdit's datasets; found int"),
        ({"a": 1}, "Expected one of EasyEdit's datasets; found dict"),
        ([], "The list is empty"),
        ([1], "of dicts; found list"),
        ([{"question": "?", "answer": "!"}], "found list with the keys answer, question"),
        (type("MQuAKEDataset", (list,), {"__module__": "easyeditor.dataset"})([EASYEDIT]), "found MQuAKEDataset"),
        ([*ZsreDataset([ZSRE]), {"prompt": "?"}], "The items of this ZsreDataset lack cond, ground_truth"),
        (type("KnowEditDataset", (list,), {})([EASYEDIT]), "lack locality_rs, .* EasyEdit has changed"),
    ],
)
def test_other_things_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        records_from(dataset)


def test_requests_for_edit_requests() -> None:
    plain, grouped = parse_records([ROME]).records[0], parse_records([WIKI_RECENT]).records[0]
    assert easyedit_requests([plain, grouped]) == [
        {
            "prompt": "Angola is in", "target_new": "Russia", "ground_truth": "Africa", "subject": "Angola",
            "rephrase_prompt": "Look: Angola is in", "portability": {},
            "locality": {
                "neighborhood": {"prompt": ["Kenya is in", "Ghana is in"], "ground_truth": ["Africa", "Africa"]}
            },
        },
        {
            "prompt": "Ana Lopes lives in", "target_new": "Porto", "ground_truth": None, "subject": "Ana Lopes",
            "portability": {
                "Reasoning": {
                    "prompt": ["The country where Ana Lopes lives is", "The river where Ana Lopes lives is"],
                    "ground_truth": ["Portugal", "Douro"],
                },
                "Logical_Generalization": {"prompt": ["Does Ana Lopes live?"], "ground_truth": ["yes"]},
            },
            "locality": {"Relation_Specificity": {"prompt": ["Ana Lopes works as"], "ground_truth": ["cook"]}},
        },
    ]  # fmt: skip
    bare = parse_records([{k: EASYEDIT[k] for k in ("prompt", "subject", "target_new", "ground_truth")}]).records
    assert easyedit_requests(bare)[0]["locality"] == {}
    assert "rephrase_prompt" not in easyedit_requests(bare)[0]


BAD_PROBE = WIKI_RECENT | {"portability": {"Reasoning": [{"prompt": "p", "ground_truth": []}]}}
HOST_FILES = {
    "rome": ("CounterFactDataset", [ROME, ROME | {"paraphrase_prompts": [5]}, ROME]),
    "counterfact": ("CounterFactDataset", [EASYEDIT | {"subject": "Peru"}, EASYEDIT, EASYEDIT]),
    "zsre": ("ZsreDataset", ZSRE_FILE),
    "wiki_counterfact": ("KnowEditDataset", [WIKI_COUNTERFACT, WIKI_COUNTERFACT | {"target_new": ""}]),
    "wiki_recent": ("KnowEditDataset", [WIKI_RECENT, BAD_PROBE, WIKI_RECENT | {"subject": "Peru"}, WIKI_RECENT]),
    "knowedit_zsre": ("KnowEditDataset", [KNOWEDIT_ZSRE, KNOWEDIT_ZSRE | {"rephrase_prompt": ""}, WIKI_RECENT]),
    "wikibio": ("KnowEditDataset", [WIKIBIO, WIKIBIO | {"concept": "peru"}]),
    "wikibigedit": (
        "WikiBigEditDataset",
        [WIKIBIGEDIT, WIKIBIGEDIT | {"mhop": None, "personas": float("nan")}, WIKIBIGEDIT | {"ans": ""}],
    ),
}


@pytest.mark.parametrize("name", HOST_FILES)
def test_host_datasets_give_what_the_reader_gives(host: ModuleType, name: str, tmp_path: Path) -> None:
    kind, raws = HOST_FILES[name]
    path = saved(tmp_path, raws)
    dataset, protocol = getattr(host, kind)(path), "zsre-alternative" if kind == "ZsreDataset" else None
    expected = load_records(path, protocol)
    assert records_from(dataset, path) == expected
    assert expected.skipped or expected.dropped or name == "knowedit_zsre"
    first = getattr(host, kind)(path, size=2)
    assert len(first) == 2
    sized = records_from(first, path)
    assert sized == parse_records(raws[: 3 if kind == "ZsreDataset" else 2], protocol=protocol)


@pytest.mark.parametrize("name", [n for n, (kind, _) in HOST_FILES.items() if kind != "ZsreDataset"])
def test_without_the_file_only_knowedit_s_paraphrases_are_missing(host: ModuleType, name: str, tmp_path: Path) -> None:
    kind, raws = HOST_FILES[name]
    path = saved(tmp_path, raws)
    without = [{k: v for k, v in raw.items() if k != "rephrase_prompt" or kind != "KnowEditDataset"} for raw in raws]
    assert records_from(getattr(host, kind)(path)) == parse_records(without)


def test_the_host_s_zsre_needs_the_file(host: ModuleType, tmp_path: Path) -> None:
    dataset = host.ZsreDataset(saved(tmp_path, ZSRE_FILE))
    assert list(ZsreDataset(ZSRE_FILE)) == [dataset[i] | {"cond": ""} for i in range(len(dataset))]
    with pytest.raises(DataError, match="drops the subject"):
        records_from(dataset)


@NEED_SHARED
@pytest.mark.parametrize("size", [None, 7, 60])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("CounterFactDataset", "counterfact-edit-200.json"), ("ZsreDataset", "zsre-mend-100.json")],
)
def test_host_datasets_of_real_records(host: ModuleType, kind: str, name: str, size: int | None) -> None:
    path = SHARED / name
    dataset = getattr(host, kind)(path, size=size)
    protocol = "zsre-alternative" if kind == "ZsreDataset" else None
    found, whole = records_from(dataset, path), load_records(path, protocol)
    assert found.records == whole.records[: len(found.records)]
    assert found.skipped == whole.skipped[: len(found.skipped)]
    if size is None:
        assert found == whole
    else:
        raws = json.loads(path.read_text(encoding="utf-8"))
        omitted = sum(raws[number].get("alt") == "" for number in _positions(found))
        assert len(found.records) + len(found.skipped) - omitted == size


def test_a_sample_of_the_host_s_zsre(host: ModuleType, tmp_path: Path) -> None:
    path = saved(tmp_path, ZSRE_FILE)
    dataset = host.ZsreDataset(path)
    sample = random.Random(0).sample([dataset[i] for i in range(len(dataset))], 3)
    by_prompt = {record.request.prompt: record for record in load_records(path, "zsre-alternative").records}
    found = records_from(sample, path).records
    assert list(found) == [by_prompt[item["prompt"]] for item in sample if item["prompt"] in by_prompt]


@pytest.mark.parametrize("raw", [EASYEDIT, WIKI_COUNTERFACT, WIKI_RECENT, KNOWEDIT_ZSRE, WIKIBIGEDIT])
def test_requests_are_those_that_the_host_prepares(host: ModuleType, raw: dict[str, Any]) -> None:
    record = parse_records([raw]).records[0]
    (request,) = easyedit_requests([record])

    def as_arguments(groups: dict[str, Any]) -> dict[str, Any]:
        return {name: {key: [value] for key, value in group.items()} for name, group in groups.items()}

    from easyeditor.editors.utils import _prepare_requests

    prepared = _prepare_requests(
        [record.request.prompt],
        [record.request.target_new],
        [record.request.ground_truth],
        rephrase_prompts=list(record.paraphrases[:1]) or None,
        locality_inputs=as_arguments(request["locality"]),
        portability_inputs=as_arguments(request["portability"]),
        subject=[record.request.subject],
    )
    assert [request] == prepared
