from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tiny import requests

from easyedit_moe.errors import DataError, EditingWarning, RequestError
from easyedit_moe.facts.records import parse_records
from easyedit_moe.facts.requests import EditRequest, parse_request, parse_requests
from easyedit_moe.statistics.corpus import load_texts

EDIT = {"prompt": "Angola is in", "subject": "Angola", "target_new": "Russia", "ground_truth": "Africa"}
PARSED = EditRequest("Angola is in", "Angola", "Russia", "Africa")


@pytest.mark.parametrize(
    "record",
    [
        EDIT,
        EDIT | {"ground_truth": ["Africa", "the south"], "locality": {}, "portability": {}, "rephrase_prompt": None},
        EDIT | {"prompt": "{} is in"},
        {"prompt": "{} is in", "subject": "Angola",
         "target_new": {"str": "Russia", "id": "Q1"}, "target_true": {"str": "Africa"}},
        {"case_id": 3, "requested_rewrite": {"prompt": "{} is in", "subject": "Angola", "relation_id": "P1",
         "target_new": {"str": "Russia"}, "target_true": {"str": "Africa", "id": "Q2"}}, "paraphrase_prompts": []},
        PARSED,
    ],
    ids=["easyedit", "easyedit-lists", "braces", "rome", "rome-nested", "parsed"],
)  # fmt: skip
def test_layouts(record: Any) -> None:
    assert parse_request(record) == PARSED
    assert parse_requests([record]) == [PARSED]


def test_ground_truth_is_optional() -> None:
    for truth in ({}, {"ground_truth": None}, {"ground_truth": []}):
        record = {k: v for k, v in EDIT.items() if k != "ground_truth"} | truth
        assert parse_request(record).ground_truth is None


def test_order_is_kept() -> None:
    parsed = parse_requests(requests(6))
    assert [p.prompt for p in parsed] == [r["prompt"] for r in requests(6)]
    assert parse_requests(tuple(requests(2))) == parsed[:2]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"subject": "Peru"}, "'Peru' does not occur in the prompt 'Angola is in'"),
        ({"subject": "angola"}, "'angola' does not occur"),
        ({"subject": ""}, "'subject' is empty or blank"),
        ({"subject": "  "}, "'subject' is empty or blank"),
        ({"subject": 5}, "'subject' must be a string; found 5"),
        ({"target_new": " \n"}, "'target_new' is empty or blank"),
        ({"target_new": 5}, "'target_new' must be a string; found 5"),
        ({"target_new": {"id": "Q1"}}, "'target_new' is missing or empty"),
        ({"prompt": ""}, "'prompt' is empty or blank"),
        ({"prompt": None}, "'prompt' is missing or empty"),
        ({"ground_truth": 5}, "'ground_truth' must be a string"),
        ({"ground_truth": [["Africa"]]}, "'ground_truth' must be a string"),
        ({"requested_rewrite": None}, "'requested_rewrite' must be a dict"),
        ({"requested_rewrite": ["x"]}, "'requested_rewrite' must be a dict"),
    ],
)
def test_unusable_requests_name_their_number(change: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        parse_request(EDIT | change)
    with pytest.raises(RequestError, match=rf"^Request 2: .*{match}"):
        parse_requests([*requests(2), EDIT | change])


def test_a_fact_may_come_without_a_subject() -> None:
    for record in (EDIT | {"subject": None}, {k: v for k, v in EDIT.items() if k != "subject"}):
        fact = parse_request(record)
        assert fact == EditRequest("Angola is in", None, "Russia", "Africa")
        with pytest.raises(RequestError, match="The subject of 'Angola is in' is needed"):
            _ = fact.named_subject
    assert PARSED.named_subject == "Angola"


@pytest.mark.parametrize("name", ["prompt", "target_new"])
def test_missing_fields(name: str) -> None:
    with pytest.raises(RequestError, match=rf"Request 0: '{name}' is missing or empty"):
        parse_requests([{k: v for k, v in EDIT.items() if k != name}])


@pytest.mark.parametrize("record", ["Angola is in", 3, None, [EDIT]])
def test_a_request_must_be_a_dict(record: Any) -> None:
    with pytest.raises(RequestError, match="Request 0: A request must be a dict; found"):
        parse_requests([record])


@pytest.mark.parametrize("batch", [EDIT, PARSED, "Angola is in", 3, None])
def test_requests_must_be_a_list(batch: Any) -> None:
    with pytest.raises(RequestError, match="must be a list"):
        parse_requests(batch)


def test_empty_list() -> None:
    with pytest.raises(RequestError, match="nothing to edit"):
        parse_requests([])


def test_duplicates_and_conflicts() -> None:
    with pytest.raises(RequestError, match="Requests 0 and 3 are the same"):
        parse_requests([EDIT, *requests(2), EDIT | {"target_new": " Russia "}])
    with pytest.raises(RequestError, match=r"Requests 1 and 3 conflict: 'Danielle.*'Polish' and 'Rome'"):
        parse_requests([EDIT, *requests(2), requests(1)[0] | {"target_new": "Rome"}])
    with pytest.raises(RequestError, match="Requests 0 and 1 conflict"):
        parse_requests([EDIT, EDIT | {"prompt": "{} is in", "target_new": "Rome"}])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Angola is in", "Angola is in "), ("Angola is in", " Angola  is\tin"), ("Angola is in", "Angola is\nin"),
        ("Angola's caf\u00e9 is in", "Angola's cafe\u0301 is in"),
    ],
)  # fmt: skip
def test_what_a_reader_takes_for_one_prompt_is_one(one: str, other: str) -> None:
    first, second = EDIT | {"prompt": one}, EDIT | {"prompt": other}
    with pytest.raises(RequestError, match="Requests 0 and 1 are the same"):
        parse_requests([first, second | {"target_new": " Russia"}])
    with pytest.raises(RequestError, match="Requests 0 and 1 conflict"):
        parse_requests([first, second | {"target_new": "Rome"}])


@pytest.mark.parametrize("other", ["angola is in Angola", "Angola is in:", "Angola is in the"])
def test_case_signs_and_words_make_another_prompt(other: str) -> None:
    assert len(parse_requests([EDIT, EDIT | {"prompt": other, "target_new": "Rome"}])) == 2


@pytest.mark.parametrize("name", ["prompt", "subject", "target_new", "ground_truth"])
def test_half_a_character_is_no_text(name: str) -> None:
    with pytest.raises(RequestError, match=rf"'{name}' holds half a character \(U\+D83D, a lone surrogate, at \d+\)"):
        parse_request(EDIT | {name: "Angola is in \ud83d"})
    assert parse_request(EDIT | {"target_new": "Russia \U0001f600"}).target_new == "Russia \U0001f600"


def test_an_iterator_is_a_list() -> None:
    assert parse_requests(iter(requests(3))) == parse_requests(requests(3))
    assert parse_requests(record for record in requests(3)) == parse_requests(requests(3))


@pytest.mark.parametrize("value", [np.array(1), np.array("Angola"), torch.tensor(1.0)], ids=repr)
def test_what_only_seems_to_be_a_list_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=f"must be a list; found {type(value).__name__}"):
        parse_requests(value)
    with pytest.raises(DataError, match=f"expected a list of texts or records; found {type(value).__name__}"):
        load_texts(value)
    with pytest.raises(DataError):
        parse_records(value)


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.tensor(1.0), np.array(["Angola"]), b"Angola", [[["x"]]], 10**400, {1}, -(10**5000)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("name", ["prompt", "subject", "target_new", "requested_rewrite"])
def test_values_of_any_type_are_refused_shortly(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(EDIT | {name: value})
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_one_subject_in_two_prompts_is_fine() -> None:
    other = EDIT | {"prompt": "Angola lies in", "target_new": "Rome"}
    assert len(parse_requests([EDIT, other])) == 2


def test_target_that_is_the_truth_warns() -> None:
    with pytest.warns(EditingWarning, match="Request 1: the target 'Africa ' equals the ground truth"):
        parsed = parse_requests([requests(1)[0], EDIT | {"target_new": "Africa "}])
    assert len(parsed) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_requests([EDIT])
