from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.easyedit_requests import checked_batches, is_nothing, requests_from_columns

EDIT = {"prompt": "Angola is in", "subject": "Angola", "target_new": "Russia", "ground_truth": "Africa"}
GROUP = {"prompt": "Kenya is in", "ground_truth": "Africa"}
NO_GROUPS = [1, True, "near", 3.5, [GROUP], {1: GROUP}, torch.ones(2), np.array(1), {"\ud800": GROUP}]


def columns(**changes: Any) -> list[dict[str, Any]]:
    names = ("prompts", "target_new", "ground_truth", "target_neg", "rephrase_prompts", "locality_inputs",
             "portability_inputs", "subject")  # fmt: skip
    given = {"prompts": ["Angola is in"], "target_new": ["Russia"], "subject": ["Angola"], **changes}
    return requests_from_columns(**{name: given.get(name) for name in names})


@pytest.mark.parametrize("section", ["locality", "portability"])
@pytest.mark.parametrize("value", NO_GROUPS, ids=ascii)
def test_groups_are_a_dict_of_texts(section: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"'{section}(: the name of a group)?' "):
        checked_batches([[EDIT | {section: value}]])
    with pytest.raises(RequestError, match=f"'{section}_inputs"):
        columns(**{f"{section}_inputs": value})


@pytest.mark.parametrize("section", ["locality", "portability"])
@pytest.mark.parametrize(
    "value", [None, {}, [], (), {"near": {}}, {"near": {"prompt": [], "ground_truth": None}}], ids=ascii
)
def test_no_groups_ask_nothing(section: str, value: Any) -> None:
    ((request,),) = checked_batches([[EDIT | {section: value}]])
    assert request.record[section] == {}
    assert columns(**{f"{section}_inputs": value})[0][section] == {}


@pytest.mark.parametrize(
    "value", [1, None, torch.tensor(1.0), torch.ones(2), b"x", ["x", 1], [None], "\ud800", [["x"]]], ids=ascii
)
@pytest.mark.parametrize("name", ["prompt", "ground_truth"])
def test_what_a_group_asks_are_texts(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match="Request 0: "):
        checked_batches([[EDIT | {"locality": {"near": GROUP | {name: value}}}]])


@pytest.mark.parametrize("value", [1, torch.ones(2), torch.tensor(1.0), b"x", ["x"], "\ud800", " "], ids=ascii)
def test_a_rephrasing_is_a_text(value: Any) -> None:
    with pytest.raises(RequestError, match=r"Request 0: .*rephrase"):
        checked_batches([[EDIT | {"rephrase_prompt": value}]])


@pytest.mark.parametrize("value", [0, 1.5, b"Angola is in", torch.ones(2), np.array("x"), {"a": 1}, {"a"}], ids=ascii)
@pytest.mark.parametrize("name", ["prompts", "target_new", "subject", "ground_truth", "rephrase_prompts", "target_neg"])
def test_columns_are_texts_or_lists(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name.removesuffix('s')}s? must be a text or a list of texts; found"):
        columns(**{name: value})


def test_an_iterator_of_requests_is_a_batch() -> None:
    assert [request.fact for request in checked_batches([iter([EDIT])])[0]] == [checked_batches([[EDIT]])[0][0].fact]
    for batch in (0, None, "x", EDIT):
        with pytest.raises(RequestError, match="must be a list"):
            checked_batches([batch])


def test_nothing_is_what_has_nothing_in_it() -> None:
    assert all(map(is_nothing, (None, [], (), {}, np.array([]), torch.ones(0))))
    assert not any(map(is_nothing, ("", 0, False, [None], np.array(1), torch.tensor(1.0), torch.ones(2), object())))
