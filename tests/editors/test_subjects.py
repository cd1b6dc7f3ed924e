"""Facts without a subject: edited by the methods that do not use it, refused by all others before anything happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from baselines import TOK, edit, settings
from tiny import assert_same_state, requests, state_of, tiny_model

from easyedit_moe import MoEEditor, load_hyperparams
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import RequestError
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import presets

WITHOUT = ["MoE-FT", "MoE-FT-L", "MoE-LoRA", "AdaLoRA"]


def bare(count: int) -> list[dict[str, Any]]:
    return [{k: v for k, v in fact.items() if k != "subject"} for fact in requests(count)]


def test_the_table_says_who_needs_subjects() -> None:
    assert [method.name for method in presets.own_methods() if not method.needs_subject] == WITHOUT
    assert all(method.needs_subject for method in presets.host_methods())


@pytest.mark.parametrize("prefixes", [[], ["It is known that "]])
@pytest.mark.parametrize("method", WITHOUT)
def test_the_same_edit_as_with_subjects(method: str, prefixes: list[str]) -> None:
    models = [tiny_model("qwen3_moe"), tiny_model("qwen3_moe")]
    before = state_of(models[0])
    results = [
        edit(model, settings(method, context_prefixes=prefixes), facts)
        for model, facts in zip(models, (bare(3), requests(3)), strict=True)
    ]
    parameters = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])
    assert any(not torch.equal(parameters[0][name], value) for name, value in before["parameters"].items())
    assert [fact["subject"] for fact in results[0].patch.metadata["requests"]] == [None] * 3
    results[0].patch.revert(models[0])
    assert_same_state(before, state_of(models[0]))


@pytest.mark.parametrize("method", [m.name for m in presets.own_methods() if m.needs_subject])
def test_other_methods_refuse_them(method: str) -> None:
    model = tiny_model()
    before = state_of(model)
    facts = parse_requests([*requests(1), *bare(3)[1:]])
    editor = make_editor(load_hyperparams(f"{method}/factworld"), progress=False)
    with pytest.raises(RequestError) as caught:
        editor.edit(model, TOK, facts)
    for part in (method, "request 1", bare(2)[1]["prompt"], "1 more", *WITHOUT):
        assert part in str(caught.value)
    assert_same_state(before, state_of(model))


def test_experts_that_are_routed_from_the_subject() -> None:
    with pytest.raises(RequestError, match="MoE-FT needs the subject of each fact, and request 0"):
        edit(tiny_model(), settings("MoE-FT", experts="routed"), bare(1))
    result = edit(tiny_model(), settings("MoE-FT", experts="routed", fact_token="last"), bare(1))
    assert result.patch.names


def test_calls_of_easyedit() -> None:
    model = tiny_model()
    before = state_of(model)
    columns = {"prompts": [f["prompt"] for f in bare(2)], "target_new": [f["target_new"] for f in bare(2)]}
    editor = MoEEditor(settings("MoE-FT"), model, TOK)
    metrics, _, _ = editor.batch_edit(**columns, sequential_edit=True)
    assert [entry["requested_rewrite"]["subject"] for entry in metrics] == [None, None]
    editor.undo()
    assert_same_state(before, state_of(model))


def test_calls_check_all_facts_before_the_first_edit() -> None:
    model = tiny_model()
    before = state_of(model)
    editor = MoEEditor(settings("UnKE"), model, TOK)
    with pytest.raises(RequestError, match="UnKE needs the subject of each fact, and request 1"):
        editor.edit(requests=[*requests(1), bare(2)[1]], sequential_edit=True)
    assert not editor.patches
    assert_same_state(before, state_of(model))
